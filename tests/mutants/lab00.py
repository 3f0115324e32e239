"""Wrong and right answers for lab 00."""

from . import Mutant


def _answer(expression: str) -> str:
    return f"def adapter_size(d_in, d_out, r):\n    return {expression}\n"


MUTANTS = {
    "0.1": [
        Mutant("multiplies the sizes", _answer("r * d_in * d_out"), "product"),
        Mutant("counts the full matrix", _answer("d_in * d_out"), "full_matrix"),
        Mutant("forgets B", _answer("r * d_in"), "only_A"),
        Mutant("forgets A", _answer("d_out * r"), "only_B"),
        Mutant("the paper's 2 d r, with d = d_in", _answer("2 * d_in * r"), "square"),
        Mutant("adds a bias", _answer("r * d_in + r * d_out + d_out"), "with_bias"),
        Mutant("an r x r matrix in the middle, as in an SVD", _answer("d_in * r + r * r + r * d_out"), "with_core"),
        Mutant("counts W0 as well", _answer("d_in * d_out + r * (d_in + d_out)"), "with_base"),
        Mutant("forgets r", _answer("d_in + d_out"), "no_rank"),
    ]
}

ALTERNATIVES = {
    "0.1": [
        _answer("d_in * r + r * d_out"),
        "def adapter_size(d_in, d_out, r):\n    return torch.empty(r, d_in).numel() + torch.empty(d_out, r).numel()\n",
        "adapter_size = lambda d_in, d_out, r: sum(p.numel() for p in nn.Sequential("
        "nn.Linear(d_in, r, bias=False), nn.Linear(r, d_out, bias=False)).parameters())\n",
    ]
}
