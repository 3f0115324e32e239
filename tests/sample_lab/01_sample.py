# %% [markdown]
# # 01 · A sample
# <!-- lab:badges -->
#
# Three short sections, so that the builder has something to build.
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False
seed = 0

# %%
# %matplotlib inline
import json
from pathlib import Path

from IPython.display import display


def record(exercise, passed):
    """What a check leaves in its cell, without the engine of checks."""
    entry = {"kind": "check", "exercise": exercise, "passed": passed}
    display({"application/vnd.lora-lab.record+json": entry, "text/plain": str(entry)}, raw=True)


def check(exercise, function, *arguments, expected):
    try:
        record(exercise, function(*arguments) == expected)
    except NotImplementedError:
        record(exercise, False)


# %% [markdown]
# ## Doubling
# Twice a number is the number added to itself.

# %% exercise="1.1"
def double(x: float) -> float:
    """Twice x."""
    ### BEGIN SOLUTION
    secret_sum = x + x
    return secret_sum
    ### END SOLUTION


# %% check="1.1"
check("1.1", double, 3, expected=6)

# %% [markdown]
# ## A class with two gaps

# %% exercise="1.2"
class Scale:
    """Multiplies by a factor."""

    def __init__(self, factor):
        ### BEGIN SOLUTION
        self.hidden_factor = factor
        ### END SOLUTION

    def __call__(self, x):
        if x is None:
            ### BEGIN SOLUTION
            return self.hidden_factor
            ### END SOLUTION
        return x


# %% check="1.2"
check("1.2", lambda: Scale(7)(None), expected=7)

# %% tags=["hidden"]
instructor_only = "not for students"

# %%
Path("where.json").write_text(json.dumps({"fast": fast, "seed": seed}))
