"""Lab 02b: adapting a model by the names of its layers, comparing over seeds, saving what was trained."""

from __future__ import annotations

from . import Mutant

LORA = "from lora_lab.layers import LoRALinear\n"

ADD_LORA_MUTANTS = [
    Mutant("wraps every linear layer, the head too", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    targets = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, module in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(module, r, alpha))
    return model
''', "every_linear"),
    Mutant("looks at the first level only", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name, child in list(model.named_children()):
        if name in names:
            setattr(model, name, LoRALinear(child, r, alpha))
    return model
''', "nested_missed"),
    Mutant("looks the names up in _modules", LORA + '''
def add_lora(model, names, r, alpha):
    for p in model.parameters():
        p.requires_grad = False
    for name in names:
        if name in model._modules:
            model._modules[name] = LoRALinear(model._modules[name], r, alpha)
    return model
''', "nested_missed"),
    Mutant("recurses into what it has just put there", LORA + '''
def add_lora(model, names, r, alpha, prefix=""):
    for p in model.parameters():
        p.requires_grad_(False)

    def walk(module, inside):
        for child_name, child in module.named_children():
            full = f"{inside}.{child_name}" if inside else child_name
            wanted = any(full == n or full.startswith(n + ".") for n in names)
            if wanted and isinstance(child, nn.Linear):
                setattr(module, child_name, LoRALinear(child, r, alpha))
            walk(getattr(module, child_name), full)

    walk(model, "")
    return model
''', "walks_into_the_new"),
    Mutant("goes over the names twice", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in list(names) * 2:
        parent, _, child = name.rpartition(".")
        old = model.get_submodule(name)
        if isinstance(old, LoRALinear):
            old.base_layer = LoRALinear(old.base_layer, r, alpha)
        else:
            setattr(model.get_submodule(parent), child, LoRALinear(old, r, alpha))
    return model
''', "wrapped_twice"),
    Mutant("freezes the adapters as well", LORA + '''
def add_lora(model, names, r, alpha):
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
    for p in model.parameters():
        p.requires_grad = False
    return model
''', "adapters_frozen"),
    Mutant("unfreezes only lora_B", LORA + '''
def add_lora(model, names, r, alpha):
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
    for n, p in model.named_parameters():
        p.requires_grad = "lora_B" in n
    return model
''', "half_frozen"),
    Mutant("freezes nothing itself", LORA + '''
def add_lora(model, names, r, alpha):
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
    return model
''', "rest_trainable"),
    Mutant("freezes all but the head", LORA + '''
def add_lora(model, names, r, alpha):
    for n, p in model.named_parameters():
        if not n.startswith("head"):
            p.requires_grad = False
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
    return model
''', "rest_trainable"),
    Mutant("freezes linear layers, forgets the LayerNorm", LORA + '''
def add_lora(model, names, r, alpha):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
    return model
''', "norm_trainable"),
    Mutant("freezes weights, not biases", LORA + '''
def add_lora(model, names, r, alpha):
    for n, p in model.named_parameters():
        if n.endswith("weight"):
            p.requires_grad = False
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
    return model
''', "biases_trainable"),
    Mutant("gives the new layer to the loop's variable", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name in names:
            module = LoRALinear(module, r, alpha)
    return model
''', "not_put_back"),
    Mutant("setattr with a dotted name", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        setattr(model, name, LoRALinear(model.get_submodule(name), r, alpha))
    return model
''', "dotted_setattr"),
    Mutant("getattr with a dotted name", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        setattr(model, name, LoRALinear(getattr(model, name), r, alpha))
    return model
''', "dotted_getattr"),
    Mutant("looks for the name inside other names", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for full, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(name in full for name in names):
            parent, _, child = full.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, r, alpha))
    return model
''', "substring"),
    Mutant("r and alpha swapped", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), alpha, r))
    return model
''', "r_alpha_swapped"),
    Mutant("passes r for alpha", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, r))
    return model
''', "wrong_scaling"),
    Mutant("return inside the loop", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
        return model
''', "only_the_first"),
    Mutant("sets the child's name on the model", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        setattr(model, name.split(".")[-1], LoRALinear(model.get_submodule(name), r, alpha))
    return model
''', "wrong_parent"),
    Mutant("adapts a copy and returns the original", LORA + '''
import copy

def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    adapted = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(adapted.get_submodule(parent), child, LoRALinear(adapted.get_submodule(name), r, alpha))
    return model
''', "not_put_back"),
    Mutant("returns nothing", LORA + '''
def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha))
''', "no_return"),
]

ADD_LORA_ALTERNATIVES = [
    '''
from lora_lab.adapt import apply_lora

def add_lora(model, names, r, alpha):
    return apply_lora(model, r, alpha, target_modules=names)
''',
    LORA + '''
def add_lora(model, names, r, alpha):
    for p in model.parameters():
        p.requires_grad = False

    def walk(module, prefix):
        for name, child in list(module.named_children()):
            full = prefix + name
            if full in names:
                module._modules[name] = LoRALinear(child, r, alpha)
            else:
                walk(child, full + ".")

    walk(model, "")
    return model
''',
    LORA + '''
def add_lora(model, names, r, alpha):
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), r=r, alpha=alpha))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(("lora_A", "lora_B"))
    return model
''',
    '''
class Adapter(nn.Module):      # a student's own layer, from lab 02
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base, self.scaling = base, alpha / r
        out, inp = base.weight.shape
        self.lora_A = nn.Parameter(torch.randn(r, inp, dtype=base.weight.dtype) / inp ** 0.5)
        self.lora_B = nn.Parameter(torch.zeros(out, r, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


def add_lora(model, names, r, alpha):
    model.requires_grad_(False)
    for name in names:
        *path, last = name.split(".")
        parent = model
        for part in path:
            parent = getattr(parent, part)
        setattr(parent, last, Adapter(getattr(parent, last), r, alpha))
    return model
''',
]


def _interval(body: str) -> str:
    return f"def paired_interval(a, b, t):\n    d, n = a - b, len(a)\n    {body}\n"


INTERVAL_MUTANTS = [
    Mutant("population standard deviation", _interval(
        "return d.mean().item(), t * d.std(correction=0).item() / n ** 0.5"), "population_std"),
    Mutant("numpy's default std", _interval(
        "return float(np.mean(d.numpy())), float(t * np.std(d.numpy()) / np.sqrt(n))"), "population_std"),
    Mutant("spread of single seeds", _interval("return d.mean().item(), t * d.std().item()"), "no_root_n"),
    Mutant("divides by n", _interval("return d.mean().item(), t * d.std().item() / n"), "divided_by_n"),
    Mutant("forgets t", _interval("return d.mean().item(), d.std().item() / n ** 0.5"), "no_t"),
    Mutant("bare standard deviation", _interval("return d.mean().item(), d.std().item()"), "no_root_n_and_no_t"),
    Mutant("variance", _interval("return d.mean().item(), t * d.var().item() / n ** 0.5"), "variance"),
    Mutant("two unrelated samples", _interval(
        "return (a.mean() - b.mean()).item(), t * ((a.var() + b.var()) / n).sqrt().item()"), "unpaired"),
    Mutant("spread of a alone", _interval("return d.mean().item(), t * a.std().item() / n ** 0.5"), "one_method"),
    Mutant("range", _interval("return d.mean().item(), (d.max() - d.min()).item()"), "range_and_no_root_n_and_no_t"),
    Mutant("whole width", _interval("return d.mean().item(), 2 * t * d.std().item() / n ** 0.5"), "twice"),
    Mutant("b minus a", _interval("return -d.mean().item(), t * d.std().item() / n ** 0.5"), "sign"),
    Mutant("median", _interval("return d.median().item(), t * d.std().item() / n ** 0.5"), "median"),
    Mutant("absolute differences", _interval(
        "d = d.abs(); return d.mean().item(), t * d.std().item() / n ** 0.5"), "absolute"),
    Mutant("sum", _interval("return d.sum().item(), t * d.std().item() / n ** 0.5"), "sum"),
    Mutant("percent", _interval("d = 100 * d; return d.mean().item(), t * d.std().item() / n ** 0.5"), "percent"),
    Mutant("n - 1 outside", _interval("return d.mean().item(), t * d.std().item() / (n - 1) ** 0.5"), "root_n_minus_1"),
    Mutant("1.96 for every n", _interval("return d.mean().item(), 1.96 * d.std().item() / n ** 0.5"), "fixed_t"),
    Mutant("only the mean", _interval("return d.mean().item()"), "one_number"),
    Mutant("the ends of the interval", _interval(
        "h = t * d.std().item() / n ** 0.5; return d.mean().item() - h, d.mean().item() + h"), "ends"),
    Mutant("forgets the return", _interval("d.mean().item(), t * d.std().item() / n ** 0.5"), "no_return"),
]

INTERVAL_ALTERNATIVES = [
    '''
import statistics

def paired_interval(a, b, t):
    d = [float(x) - float(y) for x, y in zip(a, b)]
    return statistics.fmean(d), t * statistics.stdev(d) / math.sqrt(len(d))
''',
    '''
def paired_interval(a, b, t):
    d = np.asarray(a) - np.asarray(b)
    return np.mean(d), t * np.std(d, ddof=1) / np.sqrt(d.size)
''',
    '''
def paired_interval(a, b, t):
    d = a - b
    n = d.numel()
    mean = d.sum() / n
    return mean, t * torch.sqrt(((d - mean) ** 2).sum() / (n * (n - 1)))
''',
]

SAVE_MUTANTS = [
    Mutant("the whole state_dict", '''
def tensors_to_save(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
''', "whole_model"),
    Mutant("only names with lora_", '''
def tensors_to_save(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
''', "head_forgotten"),
    Mutant("every name with lora", '''
def tensors_to_save(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
''', "name_contains_lora"),
    Mutant("lora and head, by name", '''
def tensors_to_save(model):
    wanted = ("lora_", "head")
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(w in n for w in wanted)}
''', "names_guessed"),
    Mutant("lora and the last module", '''
def tensors_to_save(model):
    last = list(dict(model.named_children()))[-1]
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or n.startswith(last)}
''', "names_guessed"),
    Mutant("freezes the model afterwards", '''
def tensors_to_save(model):
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    return saved
''', "froze_the_model"),
    Mutant("only the head", '''
def tensors_to_save(model):
    return {"head." + name: p.detach().clone() for name, p in model[-1].named_parameters()}
''', "adapters_forgotten"),
    Mutant("live tensors", '''
def tensors_to_save(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
''', "live_tensors"),
    Mutant("parameters themselves", '''
def tensors_to_save(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
''', "live_tensors"),
    Mutant("the condition the wrong way round", '''
def tensors_to_save(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
''', "frozen_only"),
    Mutant("last part of the name", '''
def tensors_to_save(model):
    return {n.split(".")[-1]: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
''', "short_names"),
    Mutant("weights without biases", '''
def tensors_to_save(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2}
''', "bias_forgotten"),
    Mutant("a list", '''
def tensors_to_save(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]
''', "no_dict"),
    Mutant("requires_grad of a state_dict", '''
def tensors_to_save(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.requires_grad}
''', "nothing_saved"),
]

SAVE_ALTERNATIVES = [
    '''
import copy

def tensors_to_save(model):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: copy.deepcopy(tensor) for name, tensor in model.state_dict().items() if name in trained}
''',
    '''
def tensors_to_save(model):
    saved = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        saved[name] = torch.tensor(parameter.detach().numpy())
    return saved
''',
    '''
def tensors_to_save(model):
    return dict((n, p.data.clone()) for n, p in filter(lambda item: item[1].requires_grad, model.named_parameters()))
''',
]

MUTANTS = {"2b.1": ADD_LORA_MUTANTS, "2b.2": INTERVAL_MUTANTS, "2b.3": SAVE_MUTANTS}
ALTERNATIVES = {"2b.1": ADD_LORA_ALTERNATIVES, "2b.2": INTERVAL_ALTERNATIVES, "2b.3": SAVE_ALTERNATIVES}
