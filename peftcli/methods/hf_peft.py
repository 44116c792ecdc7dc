"""The bridge to Hugging Face peft (Mangrulkar et al. 2022, github.com/huggingface/peft): every
tuner of the installed version, by its own name and with its own configuration.

    y = tuner(x; layer)

peft replaces the modules of a model by wrappers that hold them. Here each wrapper is taken out
again and grafted on the module that it wrapped, as a Delta: the wrapper keeps its own forward and
calls the module through a twin of it that shares its weights. So the base keeps its names, and
state, checkpoints, switching, merging and publishing are those of every other method. What peft
itself must see - its file format, its schedules - it is shown for a moment as it built it.

Ranks, scales and starts are peft's own. What it does outside of its wrappers is done in our life
cycle: AdaLoRA's regulariser and its allocation of ranks after every step (on gradients before
clipping), in as many steps as the run has where `total_step` is not given.
"""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftcli import cards
from peftcli.core import weights
from peftcli.core.delta import Delta, NotMergeable
from peftcli.core.graft import bare, deltas_of
from peftcli.core.layer import Bare, Layer
from peftcli.core.method import Method, Step
from peftcli.core.site import Site, find_sites
from peftcli.errors import ConfigError, NotApplicable, did_you_mean

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

INNER = "default"  # the adapter's name inside of peft
SLOTS = ("base_layer", "model")  # where a wrapper holds its module; the latter in AdaptedAttention
# What is decided here, or means nothing in a run.
OURS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode"
    " modules_to_save layer_replication runtime_config".split()
)
ELSEWHERE = {
    "modules_to_save": "method.modules_to_save trains modules whole",
    "layer_replication": "it copies blocks of the base",
    "trainable_token_indices": "take method.peft_type=TRAINABLE_TOKENS",
    "target_parameters": "it parametrises weights in place",
    "use_asa": "the averages that it allocates by would not survive a restart",
}
# Why a tuner cannot train in a run of ours.
REFUSED = {
    "CPT": "its loss needs the type of every token of the prompt; use method=cpt",
    "MULTITASK_PROMPT_TUNING": "every example would need the number of its task",
    "POLY": "every example would need the number of its task",
    "SHADOW": "it runs a second network beside the model, through hooks on the whole of it",
    "XLORA": "it routes between LoRA adapters that must be trained before",
}
UNKNOWN_STEPS = 10**9  # of AdaLoRA, until the loop says how many
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE")
IN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # prompts that are keys and values, not tokens


class PeftDelta(Delta):
    """y = tuner(x; layer): one of peft's wrappers on the module that it was made for."""

    def __init__(self, wrapper: nn.Module, slot: str, module: nn.Module) -> None:
        super().__init__()
        self.wrapper, self.slot = wrapper, slot
        # in __dict__ alone: the base is no part of the delta
        self.__dict__["twin"] = wrapper.__dict__[slot] = _twin(module)

    def train(self, mode: bool = True) -> PeftDelta:
        """The twin's dropout follows too."""
        self.__dict__["twin"].training = mode
        return super().train(mode)

    def forward(self, x: Any, layer: Layer) -> Any:
        """The wrapper's output; what else the module was called with goes along."""
        if not isinstance(layer, Bare):
            raise ConfigError("an adapter of method=hf_peft must be the first that is switched on.")
        if layer.key is None:
            return self.wrapper(x, *layer.args, **layer.kwargs)
        return self.wrapper(*layer.args, **{**layer.kwargs, layer.key: x})

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The wrapper's values at the unit vectors: an affine map is known by them. A wrapper that
        is not affine does not fold.
        """
        twin: nn.Module = self.__dict__["twin"]
        if isinstance(twin, nn.Embedding):
            return self.wrapper(torch.arange(W.shape[1], device=W.device)).T, b
        if not weights.has_weight_matrix(twin) or weights.kind_of(twin) != "linear":
            raise NotMergeable(f"peft's wrapper of a {type(twin).__name__} does not fold here")
        unit = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        origin = self.wrapper(torch.zeros_like(unit[:1]))  # (1, O)
        W = (self.wrapper(unit) - origin).T
        x = torch.linspace(-1, 1, W.shape[1], dtype=W.dtype, device=W.device)[None]
        if not torch.allclose(self.wrapper(x), x @ W.T + origin, atol=1e-3, rtol=1e-3):
            raise NotMergeable(f"{type(self.wrapper).__name__} of peft is not linear in its input")
        return W, origin[0] if b is not None or origin.any() else None


class PromptDelta(PeftDelta):
    """y = model([prompt; x]): a PeftModel of one of the prompt tuners, on the whole model. `P`
    tokens or keys lie before every row; only the row's own logits are given back.
    """

    def __init__(self, wrapper: nn.Module, module: nn.Module, P: int, in_cache: bool) -> None:
        super().__init__(wrapper, "base_model", module)
        self.P, self.in_cache = P, in_cache

    def forward(self, x: Any, layer: Layer) -> Any:
        """The model's output for the batch `x`; once the prompt is in the cache, it stays there."""
        past, keep = x.get("past_key_values"), x.get("logits_to_keep")
        # positions are counted from the prompt on, as peft does
        x = {k: v for k, v in x.items() if k not in ("position_ids", "cache_position")}
        if past is not None and past.get_seq_length():
            mask = x.get("attention_mask")
            if mask is not None:
                x["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.P), mask], 1)
            return layer(x)
        if self.in_cache:
            x.pop("past_key_values", None)
        elif isinstance(keep, Tensor):
            x["logits_to_keep"] = keep + self.P
        y = self.wrapper(**x)
        rows = x["input_ids"].shape[1]
        if not self.in_cache and y.logits.ndim == 3 and y.logits.shape[1] == self.P + rows:
            y.logits = y.logits[:, self.P :]
        return y

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens fold into no weight."""
        raise NotMergeable("a prompt does not fold into a weight")


def _twin(module: nn.Module) -> nn.Module:
    """The module once more: the same parameters, buffers and parts, without hooks and deltas."""
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    fresh = {k for k in vars(twin) if k not in ("_parameters", "_buffers", "training")}
    twin.__dict__.update({k: v for k, v in vars(module).items() if k not in fresh})
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


class Tuner(nn.Module):
    """What the wrappers share, and the PeftModel that they belong to (no child: it has the model).

    `sensitivity` and `uncertainty` (N,) are the averages of AdaLoRA's allocation over all of its
    parameters in turn, `kept` (K,) the triplets that it kept last: a restart goes on from them.
    """

    def __init__(self, peft: nn.Module) -> None:
        super().__init__()
        self.held = (peft,)
        inner = cast(nn.Module, peft.base_model)
        for name, child in inner._modules.items():
            if name != "model" and child is not None and hasattr(peft, "peft_type"):
                self.add_module(name, child)

        self.allocation = Allocation(cast(Any, inner)) if hasattr(inner, "rankallocator") else None


class Allocation(nn.Module):
    """AdaLoRA's averages as buffers, so that a restart goes on from them: `sensitivity` and
    `uncertainty` (N,) over all of its parameters in turn, `kept` (K,) the triplets last kept.
    """

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        own = self._own(tuner.model)
        numbers = torch.cat([p.detach().flatten() for p in own.values()])
        self.register_buffer("sensitivity", torch.zeros_like(numbers))
        self.register_buffer("uncertainty", torch.zeros_like(numbers))
        self.register_buffer("gradients", torch.zeros_like(numbers), persistent=False)
        triplets = sum(len(p) for n, p in own.items() if "lora_E" in n)
        self.register_buffer("kept", numbers.new_ones(triplets))

    def _own(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in model.named_parameters() if "lora_" in n and n.endswith(INNER)}

    def _parts(self, flat: Tensor, own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        parts = flat.split([p.numel() for p in own.values()])
        return {n: part.view_as(p) for (n, p), part in zip(own.items(), parts, strict=True)}

    @torch.no_grad()
    def keep_gradients(self, model: nn.Module) -> None:
        """Before the step clears them."""
        for held, p in zip(
            self._parts(self.get_buffer("gradients"), own := self._own(model)).values(),
            own.values(),
            strict=True,
        ):
            held.zero_() if p.grad is None else held.copy_(p.grad)

    @torch.no_grad()
    def allocate(self, tuner: Any, index: int) -> None:
        """peft's own step, on these averages and gradients."""
        own, config, allocator = (
            self._own(tuner.model),
            tuner.peft_config[INNER],
            tuner.rankallocator,
        )
        means = [self.get_buffer("sensitivity"), self.get_buffer("uncertainty")]
        triplets = {n: len(p) for n, p in own.items() if "lora_E" in n}
        if not self.get_buffer("gradients").isfinite().all():
            return  # the step was not taken either
        allocator.ipt = self._parts(torch.zeros_like(means[0]), own)
        allocator.exp_avg_ipt, allocator.exp_avg_unc = (self._parts(m.clone(), own) for m in means)
        for name, gradient in self._parts(self.get_buffer("gradients"), own).items():
            own[name].grad = gradient
        kept = self.get_buffer("kept").bool().split(list(triplets.values()))
        config.rank_pattern = {n: k.tolist() for n, k in zip(triplets, kept, strict=True)}
        tuner.update_and_allocate(index)
        for p in own.values():
            p.grad = None
        for mean, parts in zip(means, (allocator.exp_avg_ipt, allocator.exp_avg_unc), strict=True):
            if parts:  # forgotten after the last allocation
                mean.copy_(torch.cat([part.flatten() for part in parts.values()]))
        pattern = [x for n in triplets for x in config.rank_pattern[n]]
        self.get_buffer("kept").copy_(torch.tensor(pattern, dtype=means[0].dtype))
        if index < config.total_step - config.tfinal:
            config.rank_pattern = None  # until then all triplets may come back


# -- The recipe ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class HFPeft(Method):
    """A tuner of Hugging Face peft under its own name, with its own fields in `config`."""

    family: ClassVar[str] = "bridge"
    hf_fields: ClassVar[Mapping[str, str]] = {}

    peft_type: str = "LORA"  # pyright: ignore[reportIncompatibleVariableOverride]
    config: dict[str, Any] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what peft does not have, before anything is loaded."""
        _check(self.peft_type, self.config, self.target_modules)

    @property
    def lays_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Prompts lie before every row."""
        return self.peft_type in PROMPTS

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Let peft build its wrappers, and graft each on the module that it wrapped."""
        if len(host.adapters) > 1:
            raise ConfigError("method=hf_peft must be the first adapter on a model.")
        config = self._config(host)
        if self.peft_type in PROMPTS:
            self._prompt(host, config)
            return
        before = {n: _fingerprint(p) for n, p in host.model.named_parameters()}
        with _kept_flags(host.model), _quiet():
            held = _inject(host.model, config, self.peft_type)
            self._unwind(host, held, Tuner(held))
            bias = [n for n, p in host.model.named_parameters() if n in before and p.requires_grad]
        host.select(set(bias) - set(host.selected))
        for name, parameter in host.model.named_parameters():
            if name in before and _fingerprint(parameter) != before[name]:
                raise ConfigError(
                    f"peft's {self.peft_type} with this method.config changes the base's own "
                    f"weights ({name}), and the base must stay as it is. Choose another start."
                )

    def _config(self, host: Host) -> Any:
        cls = _config_class(self.peft_type)
        fields = dict(self.config)
        if self.target_modules is not None:
            sites, host.matched[host.building] = find_sites(
                host.model, host.layout, self.target_modules
            )
            fields["target_modules"] = list(dict.fromkeys(site.path for site in sites))
        if self.peft_type == "ADALORA":
            fields.setdefault("total_step", UNKNOWN_STEPS)
        if "inference_mode" not in fields:
            fields["inference_mode"] = False
        try:
            with _quiet():
                return cls(**fields)
        except (ValueError, TypeError, ImportError) as e:
            raise ConfigError(f"method.config: peft's {cls.__name__} refuses it: {e}") from None

    def _unwind(self, host: Host, held: nn.Module, tuner: Tuner) -> None:
        """Every wrapper out of the model, its module back in, and the wrapper on it as a delta."""
        found = _wrappers(host.model)
        for path, wrapper, slot in found:
            _put(host.model, path, cast(nn.Module, wrapper._modules.pop(slot)))
        for path, wrapper, slot in found:
            module = host.model.get_submodule(path)
            host.graft(_site(host, path, module), PeftDelta(wrapper, slot, module))
        trained = [n for n, p in host.model.named_parameters() if p.requires_grad]
        host.share(tuner)
        if not trained:
            raise ConfigError(f"peft's {self.peft_type} with this method.config trains nothing.")
        counts = Counter(path.rpartition(".")[2] for path, _, _ in found)
        host.matched[host.building] = host.matched[host.building] or dict(counts)

    def _prompt(self, host: Host, config: Any) -> None:
        model = cast(Any, host.model)
        generates = model.can_generate()
        if model.config.is_encoder_decoder or not (generates or hasattr(model, "num_labels")):
            raise NotApplicable(
                f"peft's {self.peft_type} does not reach {type(model).__name__}: its generation "
                "runs the encoder alone, without the prompt; method=prompt_tuning knows how."
            )
        import peft

        cls = peft.PeftModelForCausalLM if generates else peft.PeftModelForSequenceClassification
        config.task_type = "CAUSAL_LM" if generates else "SEQ_CLS"
        with _kept_flags(host.model), _quiet(), _as_config_error(self.peft_type, model):
            held = cls(host.model, config, INNER)
        for name in ("base_model", "word_embeddings"):
            held.__dict__[name] = held._modules.pop(name, None)
        site = Site("", host.model, "model", *[model.config.get_text_config().hidden_size] * 2)
        P, in_cache = config.num_virtual_tokens, self.peft_type in IN_CACHE
        host.graft(site, PromptDelta(held, host.model, P, in_cache))
        host.matched[host.building] = {"the whole model": 1}

    # -- schedules ---------------------------------------------------------------------------------
    def before_step(self, host: Host, t: Step) -> None:
        """AdaLoRA counts down over the run's own steps, where `total_step` is not given."""
        if self.peft_type == "ADALORA":
            config = _held(host, _name(host, self)).peft_config[INNER]
            config.total_step = self.config.get("total_step") or t.total
            if config.tinit >= config.total_step - config.tfinal:
                raise ConfigError(
                    f"method.config: AdaLoRA's tinit={config.tinit} and tfinal={config.tfinal} "
                    f"leave nothing of the {config.total_step} steps to lower its ranks in."
                )

    def penalty(self, host: Host) -> Tensor | None:
        """AdaLoRA: w * mean of |A A^T - I| and |B^T B - I| over all A and B."""
        if self.peft_type != "ADALORA":
            return None
        name = _name(host, self)
        terms = []
        for _, delta in host.deltas(name):
            wrapper: Any = cast(PeftDelta, delta).wrapper
            A, B = wrapper.lora_A[INNER], wrapper.lora_B[INNER]  # (R, I), (O, R)
            eye = torch.eye(len(A), device=A.device, dtype=A.dtype)
            terms += [(A @ A.T - eye).norm(), (B.T @ B - eye).norm()]
        config = _held(host, name).peft_config[INNER]
        return config.orth_reg_weight * torch.stack(terms).mean()

    def after_backward(self, host: Host, t: Step) -> None:
        """AdaLoRA weighs triplets by their gradients, which are gone after the step."""
        if self.peft_type == "ADALORA":
            allocation = _allocation(host, self)
            with as_built(host, _name(host, self)) as held:
                allocation.keep_gradients(held.base_model.model)

    def after_step(self, host: Host, t: Step) -> None:
        """AdaLoRA allocates its ranks, as peft does between `optimizer.step` and `zero_grad`."""
        if self.peft_type == "ADALORA":
            allocation = _allocation(host, self)
            with as_built(host, _name(host, self)) as held:
                allocation.allocate(held.base_model, t.index)

    # -- peft's own files --------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Never: it is peft's own."""
        return None

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """peft's configuration as peft writes it."""
        fields = _held(host, name).peft_config[INNER].to_dict()
        ours = OURS - {"peft_version", "auto_mapping"}
        return {k: _plain(v) for k, v in fields.items() if k not in ours}

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """What peft itself saves of the model as it built it."""
        import peft

        with as_built(host, name) as held:
            saved = peft.get_peft_model_state_dict(held, save_embedding_layers=False)
        return {key.removeprefix("base_model.model."): t for key, t in saved.items()}

    def load_hf(self, host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Let peft itself put its tensors in place."""
        import peft

        alone = ("prompt_", "base_model.")  # prompts, and what the wrappers share
        named = {
            key if key.startswith(alone) else f"base_model.model.{key}": tensors[key]
            for key in self.hf_tensors(host, name)
        }
        with as_built(host, name) as held, _quiet():
            peft.set_peft_model_state_dict(held, named)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """peft's fields as they are in its file."""
        known = _fields(config["peft_type"])
        dropped = OURS - {"layer_replication"}
        values = {k: v for k, v in config.items() if k in known and k not in dropped}
        if config["peft_type"] in PROMPTS:
            values["inference_mode"] = True  # the prompt itself was saved, not what made it
        return {"peft_type": config["peft_type"], "config": values, "target_modules": None}


# -- peft's configuration --------------------------------------------------------------------------
def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "method=hf_peft needs Hugging Face peft: pip install 'peftcli[peft]'"
        ) from None
    return peft


def _config_class(peft_type: str) -> Any:
    _peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    tuners: dict[str, Any] = {t.value: cls for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in tuners:
        near = did_you_mean(peft_type.upper(), tuners)
        raise ConfigError(
            f"method.peft_type={peft_type}: the installed peft has no such tuner.{near} It has "
            f"{', '.join(sorted(tuners))}."
        )
    return tuners[peft_type]


def _fields(peft_type: str) -> dict[str, Any]:
    """The tuner's fields and their types."""
    cls = _config_class(peft_type)
    hints = typing.get_type_hints(cls)
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}


def _check(peft_type: str, config: Mapping[str, Any], targets: Any) -> None:
    """The one message about what peft does not have, or what cannot be had here."""
    fields = _fields(peft_type)
    if peft_type in REFUSED:
        raise ConfigError(f"method.peft_type={peft_type} cannot train here: {REFUSED[peft_type]}.")
    known = [name for name in fields if name not in OURS]
    wrong = [_wrong(peft_type, key, value, fields, known) for key, value in config.items()]
    if targets is not None and "target_modules" in config:
        wrong.append("method.target_modules and method.config.target_modules: give one of them.")
    if targets is not None and "target_modules" not in fields:
        wrong.append(f"method.target_modules: peft's {peft_type} has none; leave it null.")
    if peft_type in PROMPTS and config.get("num_virtual_tokens") is None:
        wrong.append("method.config.num_virtual_tokens has no value; give one, such as 20.")
    if told := [text for text in wrong if text]:
        raise ConfigError("\n".join(told))


def _wrong(
    peft_type: str, key: str, value: Any, fields: Mapping[str, Any], known: list[str]
) -> str | None:
    """What is wrong with one entry of `method.config`, or None."""
    if key in ELSEWHERE and key in fields and value:
        return f"method.config.{key} cannot be used here: {ELSEWHERE[key]}."
    if key == "inference_mode":
        return None
    if key not in known:
        near = did_you_mean(key, known) or f" It has {', '.join(known)}."
        return f"method.config.{key}: peft's {peft_type} has no such field.{near}"
    if key == "init_lora_weights" and value not in (True, False, "gaussian", "orthogonal"):
        return (
            f"method.config.{key}={value} changes the base's own weights or looks at data; take "
            "true, false, gaussian or orthogonal, or method=lora with its method.init."
        )
    if not _fits(value, fields[key]):
        return f"method.config.{key}={value!r}: takes {_in_words(fields[key])}."
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of YAML may stand for the type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in args)
    if origin in (list, set, tuple, frozenset):
        return isinstance(value, list | tuple | set)
    if origin is dict:
        return isinstance(value, Mapping)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float)
    if hint is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not isinstance(hint, type):
        return True
    if dataclasses.is_dataclass(hint) or hint in (list, set, tuple):
        return isinstance(value, Mapping | list | tuple | set | hint)
    return isinstance(value, hint) or (issubclass(hint, str) and isinstance(value, str))


def _in_words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_in_words, args)))
    if origin in (list, set):
        return f"a list of {_in_words(args[0])}"
    return cards.in_words(hint)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


# -- into the model and out of it ------------------------------------------------------------------
def _inject(model: nn.Module, config: Any, peft_type: str) -> nn.Module:
    """The PeftModel around `model`, wrappers in place; where peft refuses, the model as it was."""
    with _as_config_error(peft_type, model):
        try:
            return _peft().PeftModel(model, config, INNER)
        except Exception:
            for path, wrapper, slot in _wrappers(model):
                _put(model, path, cast(nn.Module, wrapper._modules[slot]))
            raise
        finally:
            vars(model).pop("peft_config", None)  # a mark that only peft itself reads


@contextmanager
def _as_config_error(peft_type: str, model: nn.Module) -> Iterator[None]:
    """peft's own refusals, as the user's to put right."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError, AttributeError, KeyError) as e:
        said = " ".join(str(e).split()).rstrip(".")
        if "specify `target_modules`" in said or ("`target_modules`" in said and "pecify" in said):
            raise NotApplicable(
                f"peft's {peft_type} has no default targets for {type(model).__name__}; "
                "name them: method.target_modules."
            ) from None
        raise ConfigError(
            f"peft's {peft_type} refuses {type(model).__name__}: {said}. Its options stand under "
            "method.config."
        ) from None


def _wrappers(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(path, wrapper, slot) of peft's wrappers in the model, outermost alone."""
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[tuple[str, nn.Module, str]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        wraps = isinstance(cast(Any, module), BaseTunerLayer | _BaseAdaptedAttention)
        if wraps:
            slot = next(s for s in SLOTS if s in module._modules)
            if not any(path.startswith(outer + ".") for outer, _, _ in found):
                found.append((path, module, slot))
    return found


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module


@contextmanager
def as_built(host: Host, name: str) -> Iterator[Any]:
    """The PeftModel as peft built it, for its own functions: wrappers in the model, the base in
    them.
    """
    deltas = [(site.path, cast(PeftDelta, delta)) for site, delta in host.deltas(name)]
    held = _held(host, name)
    with bare(host.model):
        modules = [host.model.get_submodule(path) for path, _ in deltas]
        try:
            for (path, delta), module in zip(deltas, modules, strict=True):
                vars(delta.wrapper).pop(delta.slot)
                delta.wrapper._modules[delta.slot] = module
                if path:
                    _put(host.model, path, delta.wrapper)
            yield held
        finally:
            for (path, delta), module in zip(deltas, modules, strict=True):
                delta.wrapper._modules.pop(delta.slot)
                vars(delta.wrapper)[delta.slot] = vars(delta)["twin"]
                if path:
                    _put(host.model, path, module)


def _held(host: Host, name: str) -> Any:
    """The adapter's PeftModel."""
    delta = deltas_of(host.model).get(name)
    return delta.wrapper if isinstance(delta, PromptDelta) else cast(Any, host.shared(name)).held[0]


def _allocation(host: Host, method: Method) -> Allocation:
    return cast(Any, host.shared(_name(host, method))).allocation


def _name(host: Host, method: Method) -> str:
    return next(name for name, held in host.adapters.items() if held is method)


def _site(host: Host, path: str, module: nn.Module) -> Site:
    """Where a wrapper stood."""
    role, layer = host.layout.role_of(path), host.layout.block_of(path)
    if weights.has_weight_matrix(module):
        d_out, d_in = weights.shape(module)
        groups = getattr(module, "groups", 1)
        return Site(path, module, weights.kind_of(module), d_in, d_out, role, layer, groups=groups)
    width = cast(Any, host.model).config.get_text_config().hidden_size
    return Site(path, module, role or type(module).__name__, width, width, role, layer)


@contextmanager
def _kept_flags(model: nn.Module) -> Iterator[None]:
    """What trained before still does: peft freezes all that is not its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's advice, which is about its own command."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fingerprint(parameter: Tensor) -> Any:
    """Two sums of a weight, which no rewriting of it leaves alone."""
    if parameter.is_meta:
        return None
    values = parameter.detach().double()
    return values.sum().item(), values.square().sum().item()
