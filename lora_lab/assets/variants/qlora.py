"""QLoRA, arXiv 2305.14314:  W = Q(W0) + scaling B A,  Q(W0) 4-bit codes with one scale for each 64"""

import torch
from torch import nn
from torch.nn import functional as F

NF4 = torch.tensor([  # 16 levels, as dense as a normal distribution
    -1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])


class Layer(nn.Module):
    def __init__(self, W0, r, alpha):
        super().__init__()
        d_out, d_in = W0.shape
        blocks = F.pad(W0.detach().flatten(), (0, -W0.numel() % 64)).view(-1, 64)
        scales = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
        middles = (NF4[1:] + NF4[:-1]).to(W0) / 2
        codes = torch.bucketize(blocks / scales, middles)  # the nearest level
        self.register_buffer("codes", (codes[:, ::2] * 16 + codes[:, 1::2]).byte())  # two in a byte
        self.register_buffer("scales", scales)  # the paper stores these in 8 bits
        self.shape = W0.shape
        self.A = nn.Parameter(W0.new_zeros(r, d_in))
        self.B = nn.Parameter(W0.new_zeros(d_out, r))
        self.scaling = alpha / r

    @property
    def W0(self):  # made anew each time; autograd keeps it until the backward pass
        codes = torch.stack([self.codes // 16, self.codes % 16], -1).view(-1, 64)
        values = NF4.to(self.scales)[codes.long()] * self.scales
        return values.flatten()[: self.shape.numel()].view(self.shape)

    def forward(self, x):  # (tokens, d_in) -> (tokens, d_out)
        return x @ self.W0.T + self.scaling * (x @ self.A.T @ self.B.T)

    def merged(self):  # (d_out, d_in)
        return self.W0 + self.scaling * (self.B @ self.A)


@torch.no_grad()
def start(layer, inputs):  # inputs: what the layer reads in training, (tokens, d_in)
    nn.init.kaiming_uniform_(layer.A, a=5**0.5)
    nn.init.zeros_(layer.B)


def optimizer(layer, lr):
    groups = [
        {"params": [layer.A], "lr": lr},
        {"params": [layer.B], "lr": lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)
