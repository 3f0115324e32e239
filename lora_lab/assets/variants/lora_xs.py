"""LoRA-XS, arXiv 2405.17604:  W = W0 + scaling B R A,  W0 = U S Vh,  B = U_r S_r,  A = Vh_r"""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, W0, r, alpha):
        super().__init__()
        d_out, d_in = W0.shape
        self.W0 = nn.Parameter(W0.clone(), requires_grad=False)
        self.A = nn.Parameter(W0.new_zeros(r, d_in), requires_grad=False)
        self.B = nn.Parameter(W0.new_zeros(d_out, r), requires_grad=False)
        self.R = nn.Parameter(W0.new_zeros(r, r))
        self.scaling = alpha / r

    def forward(self, x):  # (tokens, d_in) -> (tokens, d_out)
        return x @ self.W0.T + self.scaling * (x @ self.A.T @ self.R.T @ self.B.T)

    def merged(self):  # (d_out, d_in)
        return self.W0 + self.scaling * (self.B @ self.R @ self.A)


@torch.no_grad()
def start(layer, inputs):  # inputs: what the layer reads in training, (tokens, d_in)
    r = len(layer.A)
    U, S, Vh = torch.linalg.svd(layer.W0, full_matrices=False)
    layer.A.copy_(Vh[:r])
    layer.B.copy_(U[:, :r] * S[:r])
    nn.init.zeros_(layer.R)


def optimizer(layer, lr):
    groups = [
        {"params": [layer.R], "lr": lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)
