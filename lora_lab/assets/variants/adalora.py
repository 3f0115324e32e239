"""AdaLoRA, arXiv 2303.10512:  W = W0 + scaling B diag(E) A,  entries of E are set to zero over all layers together"""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, W0, r, alpha):
        super().__init__()
        d_out, d_in = W0.shape
        self.W0 = nn.Parameter(W0.clone(), requires_grad=False)
        self.A = nn.Parameter(W0.new_zeros(r, d_in))
        self.B = nn.Parameter(W0.new_zeros(d_out, r))
        self.E = nn.Parameter(W0.new_zeros(r))
        self.scaling = alpha / r

    def forward(self, x):  # (tokens, d_in) -> (tokens, d_out)
        return x @ self.W0.T + self.scaling * (x @ self.A.T * self.E @ self.B.T)

    def merged(self):  # (d_out, d_in)
        return self.W0 + self.scaling * (self.B * self.E @ self.A)


@torch.no_grad()
def start(layer, inputs):  # inputs: what the layer reads in training, (tokens, d_in)
    nn.init.normal_(layer.A, std=0.02)
    nn.init.normal_(layer.B, std=0.02)
    nn.init.zeros_(layer.E)


def optimizer(layer, lr):
    groups = [
        {"params": [layer.A], "lr": lr},
        {"params": [layer.B], "lr": lr},
        {"params": [layer.E], "lr": lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def orthogonality(layer):  # added to the loss, times 0.1 to 0.5
    return sum((M @ M.T - torch.eye(len(M)).to(M)).norm() for M in (layer.B.T, layer.A))


def score(w, means):  # |w dL/dw|, times how much that changes: running means
    now = (w * w.grad).abs()
    mean, change = means.get(w, (0, 0))
    mean = 0.85 * mean + 0.15 * now
    change = 0.85 * change + 0.15 * (now - mean).abs()
    means[w] = mean, change
    return mean * change


def allowed(part, total, target):  # directions, all layers together; part from 0 to 1
    return target + int((total - target) * (1 - part) ** 3)


@torch.no_grad()
def prune(layers, keep, means):  # after each step; means is a dict, empty at first
    scores = [score(one.E, means) + score(one.B, means).mean(0) + score(one.A, means).mean(1)
              for one in layers]
    least = torch.cat(scores).topk(keep).values.min()
    for layer, s in zip(layers, scores, strict=True):
        layer.E *= s >= least
