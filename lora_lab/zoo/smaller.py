"""A smaller model instead of a small change: distillation, and magnitude pruning.

    distillation   a student learns what a teacher says, all probabilities and not only the largest     Hinton et al. 2015, arXiv 1503.02531
    pruning        the smallest weights are set to zero                                                 Han et al. 2015, arXiv 1506.02626
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import find_targets

# ---- distillation


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)), in nats, the mean over all but the last dimension.

    student, teacher (..., classes): logits. T² keeps the gradient's size: each softmax at temperature T has gradients T times smaller, twice.
    Raises ValueError for T <= 0 and for other shapes.
    """
    if temperature <= 0 or student.shape != teacher.shape:
        raise ValueError(f"temperature > 0 and logits of one shape; found {temperature}, {tuple(student.shape)} and {tuple(teacher.shape)}")
    p = F.log_softmax(teacher.flatten(0, -2).float() / temperature, -1)
    q = F.log_softmax(student.flatten(0, -2).float() / temperature, -1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def distils(teacher: nn.Module, loss: Callable, temperature: float = 2.0, share: float = 0.5) -> Callable:
    """A loss for `train`: share * distillation_loss + (1 - share) * loss, on pairs (x, y) or on texts as `token_loss` takes them.

    Of a text only those positions count that have a label to predict (-100: none). The teacher is asked in eval mode, without gradients.
    Raises ValueError unless 0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share of the teacher's part, between 0 and 1; found {share}")
    teacher.eval()

    def both(student: nn.Module, batch) -> Tensor:
        if isinstance(batch, dict):
            asked = batch["labels"][:, 1:] != -100
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            mine = student(**inputs).logits[:, :-1][asked]
            with torch.no_grad():
                its = teacher(**inputs).logits[:, :-1][asked]
            hard = F.cross_entropy(mine.float(), batch["labels"][:, 1:][asked])
        else:
            mine = student(batch[0])
            with torch.no_grad():
                its = teacher(batch[0])
            hard = loss(student, batch) if share < 1 else 0.0
        return share * distillation_loss(mine, its, temperature) + (1 - share) * hard

    return both


def fewer_blocks(model: nn.Module, blocks: str, keep: int) -> nn.Module:
    """A copy of the model with `keep` of its blocks, evenly spread from the first to the last (of one: the last): where a student begins.

    The first block matters: on ordinary prose the pocket GPT-2 (4.2 nats a token) has 4.8 with blocks 0, 2, 5 and 9.3 with 1, 3, 5.
    blocks   name of the ModuleList or Sequential of blocks, "transformer.h" for GPT-2, whose blocks are numbered anew. Raises ValueError.
    """
    stack = model.get_submodule(blocks)
    if not 1 <= keep <= len(stack):
        raise ValueError(f"of {len(stack)} blocks at least 1 stays; found keep={keep}")
    student = copy.deepcopy(model)
    chosen = [round(k * (len(stack) - 1) / (keep - 1)) for k in range(keep)] if keep > 1 else [len(stack) - 1]
    left = student.get_submodule(blocks)
    for k in reversed(range(len(stack))):
        if k not in chosen:
            del left[k]
    if hasattr(student, "config") and hasattr(student.config, "n_layer"):
        student.config = copy.deepcopy(student.config)
        student.config.n_layer = keep
        for module in student.modules():
            if hasattr(module, "config"):
                module.config = student.config
        for k, block in enumerate(left):
            block.attn.layer_idx = k  # its place in the cache of keys and values
    return student


# ---- pruning


@torch.no_grad()
def prune(model: nn.Module, share: float, target_modules="all-linear") -> nn.Module:
    """Set the `share` of weights with the smallest absolute value to zero, in place, in all target layers together; return the model.

    Biases, norms and embeddings stay. A zero is still stored and still multiplied, unless a file or a kernel knows about zeros: `sparse_bytes`.
    Raises ValueError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share of weights that become zero: 0 <= share < 1; found {share}")
    weights = [module.weight for module in find_targets(model, target_modules).values()]
    sizes = torch.cat([w.abs().flatten() for w in weights])
    count = int(share * sizes.numel())
    if count:
        order = sizes.argsort()[:count]  # by rank and not by a threshold: equal values would all go
        keep = torch.ones_like(sizes, dtype=torch.bool)
        keep[order] = False
        for w, mask in zip(weights, keep.split([w.numel() for w in weights]), strict=True):
            w.mul_(mask.view(w.shape))
    return model


def sparse_bytes(weight: Tensor) -> int:
    """Bytes of a matrix stored as a bit for each number, zero or not, and the numbers that are not zero."""
    return -(-weight.numel() // 8) + int(weight.count_nonzero()) * weight.element_size()
