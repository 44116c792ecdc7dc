"""peft's wrappers on a model of ours: peft builds them where it will, and here each is taken out
again and grafted on the module that it wrapped. A prompt is one wrapper, on the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.bridge.as_built import Tuner, put
from peftcli.methods.bridge.delta import PeftDelta, PromptDelta
from peftcli.methods.bridge.fields import INNER, installed_peft, quiet

if TYPE_CHECKING:
    from peftcli.core.host import Host

SLOTS = ("base_layer", "model")  # where a wrapper holds its module; the latter in AdaptedAttention
IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # prompts that are keys and values, not tokens


# -- modules ---------------------------------------------------------------------------------------
def wrap_modules(host: Host, config: Any, peft_type: str) -> None:
    """Let peft build its wrappers, and graft each on the module that it wrapped. Biases that it
    trains are selected; a start that rewrites the base is refused.
    """
    before = {n: _fingerprint(p) for n, p in host.model.named_parameters()}
    with _kept_flags(host.model), quiet():
        _unwind(host, Tuner(_inject(host.model, config, peft_type)), peft_type)
        bias = [n for n, p in host.model.named_parameters() if n in before and p.requires_grad]
    host.select(set(bias) - set(host.selected))
    for name, parameter in host.model.named_parameters():
        if name in before and _fingerprint(parameter) != before[name]:
            raise ConfigError(
                f"peft's {peft_type} with this method.config changes the base's own weights "
                f"({name}), and the base must stay as it is. Choose another start."
            )


def _inject(model: nn.Module, config: Any, peft_type: str) -> nn.Module:
    """The PeftModel around `model`, wrappers in place; where peft refuses, the model as it was."""
    with _as_config_error(peft_type, model):
        try:
            return installed_peft().PeftModel(model, config, INNER)
        except Exception:
            for path, wrapper, slot in _wrappers(model):
                put(model, path, cast(nn.Module, wrapper._modules[slot]))
            raise
        finally:
            vars(model).pop("peft_config", None)  # a mark that only peft itself reads


def _wrappers(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(path, wrapper, slot) of peft's wrappers in the model, outermost alone."""
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, nn.Module, str]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(cast(Any, module), BaseTunerLayer | _BaseAdaptedAttention):
            continue
        slot = next(s for s in SLOTS if s in module._modules)
        if not any(path.startswith(outer + ".") for outer, _, _ in found):
            found.append((path, module, slot))
    return found


def _unwind(host: Host, tuner: Tuner, peft_type: str) -> None:
    """Every wrapper out of the model, its module back in, and the wrapper on it as a delta."""
    found = _wrappers(host.model)
    for path, wrapper, slot in found:
        put(host.model, path, cast(nn.Module, wrapper._modules.pop(slot)))
    for path, wrapper, slot in found:
        module = host.model.get_submodule(path)
        host.graft(_site(host, path, module), PeftDelta(wrapper, slot, module))
    trained = [n for n, p in host.model.named_parameters() if p.requires_grad]
    host.share(tuner)
    if not trained:
        raise ConfigError(f"peft's {peft_type} with this method.config trains nothing.")
    counts = Counter(path.rpartition(".")[2] for path, _, _ in found)
    host.matched[host.building] = host.matched[host.building] or dict(counts)


def _site(host: Host, path: str, module: nn.Module) -> Site:
    """Where a wrapper stood."""
    role, layer = host.layout.role_of(path), host.layout.block_of(path)
    if weights.has_weight_matrix(module):
        d_out, d_in = weights.shape(module)
        groups = getattr(module, "groups", 1)
        return Site(path, module, weights.kind_of(module), d_in, d_out, role, layer, groups=groups)
    width = _width(host.model)
    return Site(path, module, role or type(module).__name__, width, width, role, layer)


# -- prompts ---------------------------------------------------------------------------------------
def wrap_model(host: Host, config: Any, peft_type: str) -> None:
    """Let peft lay its prompt before the rows of the whole model."""
    model = cast(Any, host.model)
    generates = model.can_generate()
    if model.config.is_encoder_decoder or not (generates or hasattr(model, "num_labels")):
        raise NotApplicable(
            f"peft's {peft_type} does not reach {type(model).__name__}: its generation "
            "runs the encoder alone, without the prompt; method=prompt_tuning knows how."
        )
    peft = installed_peft()
    cls = peft.PeftModelForCausalLM if generates else peft.PeftModelForSequenceClassification
    config.task_type = "CAUSAL_LM" if generates else "SEQ_CLS"
    with _kept_flags(model), quiet(), _as_config_error(peft_type, model):
        held = cls(model, config, INNER)
    for name in ("base_model", "word_embeddings"):
        held.__dict__[name] = held._modules.pop(name, None)
    width = _width(model)
    site = Site("", model, "model", width, width)
    host.graft(site, PromptDelta(held, model, config.num_virtual_tokens, peft_type in IN_CACHE))
    host.matched[host.building] = {"the whole model": 1}


# -- what both are careful about -------------------------------------------------------------------
@contextmanager
def _as_config_error(peft_type: str, model: nn.Module) -> Iterator[None]:
    """peft's own refusals, as the user's to put right."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError, AttributeError, KeyError) as e:
        said = " ".join(str(e).split()).rstrip(".")
        if "`target_modules`" in said and "pecify" in said:
            raise NotApplicable(
                f"peft's {peft_type} has no default targets for {type(model).__name__}; "
                "name them: method.target_modules."
            ) from None
        raise ConfigError(
            f"peft's {peft_type} refuses {type(model).__name__}: {said}. Its options stand under "
            "method.config."
        ) from None


@contextmanager
def _kept_flags(model: nn.Module) -> Iterator[None]:
    """What trained before still does: peft freezes all that is not its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


def _fingerprint(parameter: Tensor) -> Any:
    """Two sums of a weight, which no rewriting of it leaves alone."""
    if parameter.is_meta:
        return None
    values = parameter.detach().double()
    return values.sum().item(), values.square().sum().item()


def _width(model: nn.Module) -> int:
    return cast(Any, model).config.get_text_config().hidden_size
