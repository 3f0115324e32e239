"""What LoRA is compared with, and what stands beside it: one short file each, small enough to read in one sitting.

    rivals      few numbers trained: last layers, BitFit, bottleneck adapters, prompts and prefixes; and several adapters in one batch
    quantised   the weights in 8 or 4 bits: after training, or below LoRA
    smaller     distillation into a smaller model, magnitude pruning
    costs       memory of a training step, latency
    ways        all of them as ways of lora_lab.comparing, with the bytes of the file that each leaves behind
    variants    LoRA's variants: other layers, starts, ways to train
    race        the fair race between them: equal budgets, tuned learning rates, twins that show what luck does
    ranks       choosing the rank automatically: by energy, by AdaLoRA, by a search
    keras_lora  the same layer in Keras, and weights carried over; imports Keras
"""
