"""DoRA, arXiv 2402.09353:  W = m V / ‖V‖,  V = W0 + scaling B A,  ‖V‖ the norms of V's rows"""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, W0, r, alpha):
        super().__init__()
        d_out, d_in = W0.shape
        self.W0 = nn.Parameter(W0.clone(), requires_grad=False)
        self.A = nn.Parameter(W0.new_zeros(r, d_in))
        self.B = nn.Parameter(W0.new_zeros(d_out, r))
        self.m = nn.Parameter(W0.new_zeros(d_out))
        self.scaling = alpha / r

    def forward(self, x):  # (tokens, d_in) -> (tokens, d_out)
        return self.ratio() * (x @ self.W0.T + self.scaling * (x @ self.A.T @ self.B.T))

    def merged(self):  # (d_out, d_in)
        return self.ratio()[:, None] * (self.W0 + self.scaling * (self.B @ self.A))

    def ratio(self):  # (d_out,): m / ‖V‖; no gradient flows through the norm
        V = self.W0 + self.scaling * (self.B @ self.A)
        return self.m / V.norm(dim=1).detach()


@torch.no_grad()
def start(layer, inputs):  # inputs: what the layer reads in training, (tokens, d_in)
    nn.init.kaiming_uniform_(layer.A, a=5**0.5)
    nn.init.zeros_(layer.B)
    layer.m.copy_(layer.W0.norm(dim=1))


def optimizer(layer, lr):
    groups = [
        {"params": [layer.A], "lr": lr},
        {"params": [layer.B], "lr": lr},
        {"params": [layer.m], "lr": lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)
