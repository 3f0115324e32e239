"""Wrong and right answers for lab 00b."""

from . import Mutant


def _answer(expression: str) -> str:
    return f"import math\ndef bits_per_byte(loss, tokens, text):\n    return {expression}\n"


MUTANTS = {
    "0b.1": [
        Mutant("stays with nats", _answer("loss * tokens / len(text.encode())"), "nats"),
        Mutant("multiplies by ln 2", _answer("loss * math.log(2) * tokens / len(text.encode())"), "times_ln2"),
        Mutant("counts characters", _answer("loss * tokens / math.log(2) / len(text)"), "characters"),
        Mutant("nats, and characters", _answer("loss * tokens / len(text)"), "nats_characters"),
        Mutant("bits per token", _answer("loss / math.log(2)"), "per_token"),
        Mutant("takes the mean for the sum", _answer("loss / math.log(2) / len(text.encode())"), "sum_forgotten"),
        Mutant("bytes per token upside down", _answer("loss / math.log(2) * len(text.encode()) / tokens"), "upside_down"),
        Mutant("the wrong logarithm", _answer("loss * tokens / math.log(10) / len(text.encode())"), "log10"),
        Mutant("perplexity", _answer("math.exp(loss)"), "perplexity"),
        Mutant("the whole text's bits", _answer("loss * tokens / math.log(2)"), "total"),
    ]
}

ALTERNATIVES = {
    "0b.1": [
        _answer("loss * math.log2(math.e) * tokens / len(bytes(text, 'utf-8'))"),
        "import numpy as np\ndef bits_per_byte(loss, tokens, text):\n"
        "    return -np.log2(np.exp(-loss)) * tokens / sum(len(c.encode('utf8')) for c in text)\n",
        "def bits_per_byte(loss, tokens, text):\n    bits = torch.tensor(loss) / torch.log(torch.tensor(2.0)) * tokens\n"
        "    return (bits / len(text.encode())).item()\n",
    ]
}
