"""VeRA, arXiv 2310.11454:  W = W0 + diag(b) B diag(d) A,  one random A and B for all layers"""

import torch
from torch import nn


def matrices(r, d_in, d_out, seed=0):  # once, for the widest d_in and d_out there are
    draw = torch.Generator().manual_seed(seed)
    A = nn.init.kaiming_uniform_(torch.empty(r, d_in), generator=draw)
    B = nn.init.kaiming_uniform_(torch.empty(d_out, r), generator=draw)
    return A, B


class Layer(nn.Module):
    def __init__(self, W0, r, alpha, shared=None):
        super().__init__()
        d_out, d_in = W0.shape
        self.W0 = nn.Parameter(W0.clone(), requires_grad=False)
        A, B = shared or matrices(r, d_in, d_out)  # the same for all layers: a corner
        self.A = nn.Parameter(A[:, :d_in].to(W0), requires_grad=False)
        self.B = nn.Parameter(B[:d_out].to(W0), requires_grad=False)
        self.d = nn.Parameter(W0.new_zeros(r))
        self.b = nn.Parameter(W0.new_zeros(d_out))
        self.scaling = 1.0  # without alpha: b and d set the size

    def forward(self, x):  # (tokens, d_in) -> (tokens, d_out)
        return x @ self.W0.T + self.scaling * (x @ self.A.T * self.d @ self.B.T * self.b)

    def merged(self):  # (d_out, d_in)
        return self.W0 + self.scaling * (self.b[:, None] * self.B * self.d @ self.A)


@torch.no_grad()
def start(layer, inputs):  # inputs: what the layer reads in training, (tokens, d_in)
    nn.init.constant_(layer.d, 0.1)
    nn.init.zeros_(layer.b)


def optimizer(layer, lr):
    groups = [
        {"params": [layer.d], "lr": lr},
        {"params": [layer.b], "lr": lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)
