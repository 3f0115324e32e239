"""Tasks for labs 08 and 09, one file each: the data, the pretrained base, and the `Task` for `lora_lab.comparing.finetune_and_compare`."""
