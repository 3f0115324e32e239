"""PiSSA, arXiv 2404.02948:  W0 = U S Vh,  scaling B A = U_r S_r Vh_r at the start,  W0 keeps the rest"""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, W0, r, alpha):
        super().__init__()
        d_out, d_in = W0.shape
        self.W0 = nn.Parameter(W0.clone(), requires_grad=False)
        self.A = nn.Parameter(W0.new_zeros(r, d_in))
        self.B = nn.Parameter(W0.new_zeros(d_out, r))
        self.scaling = alpha / r

    def forward(self, x):  # (tokens, d_in) -> (tokens, d_out)
        return x @ self.W0.T + self.scaling * (x @ self.A.T @ self.B.T)

    def merged(self):  # (d_out, d_in)
        return self.W0 + self.scaling * (self.B @ self.A)


@torch.no_grad()
def start(layer, inputs):  # inputs: what the layer reads in training, (tokens, d_in)
    r = len(layer.A)
    U, S, Vh = torch.linalg.svd(layer.W0, full_matrices=False)
    root = (S[:r] / layer.scaling).sqrt()
    layer.A.copy_(root[:, None] * Vh[:r])
    layer.B.copy_(U[:, :r] * root)
    layer.W0 -= layer.scaling * (layer.B @ layer.A)


def optimizer(layer, lr):
    groups = [
        {"params": [layer.A], "lr": lr},
        {"params": [layer.B], "lr": lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)
