"""Roles: what a module does, whatever its name. The only file to know architectures' names.

A linear inside a transformer block is one of q, k, v, o, gate, up, down. Where one linear computes
several of them, each role is a set of its output rows. Names are looked up by the longest matching
end of a module's path, in one table for all architectures. Only the row layout of fused linears
depends on the architecture; where it is unknown, the linear keeps one role of its own (`qkv`,
`gate_up`) instead of a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

Rows = tuple[tuple[int, int], ...]  # (start, stop) of output rows

_INSIDE = {  # role: ends of paths inside a block
    "q": "q_proj q q_lin query query_proj q_attn wq",
    "k": "k_proj k k_lin key key_proj wk",
    "v": "v_proj v v_lin value value_proj wv",
    "o": "o_proj out_proj o out_lin attention.output.dense attn.c_proj crossattention.c_proj "
    "attention.dense self_attention.dense self_attn.dense attn.Wo attention.wo",
    "pos_q": "pos_query_proj",
    "pos_k": "pos_key_proj",
    "qkv": "qkv_proj c_attn query_key_value Wqkv wqkv qkv",
    "gate": "gate_proj wi_0 w1",
    "up": "up_proj wi wi_1 w3 fc1 lin1 c_fc fc_in dense_h_to_4h intermediate.dense",
    "down": "down_proj wo w2 fc2 lin2 mlp.c_proj fc_out dense_4h_to_h output.dense mlp.Wo",
    "gate_up": "gate_up_proj mlp.Wi",
    "router": "mlp.gate router shared_expert_gate",
    "experts": "experts",
    "attention": "attention attn self_attn self_attention cross_attn crossattention encoder_attn "
    "SelfAttention EncDecAttention",
    "mlp": "mlp ffn feed_forward DenseReluDense block_sparse_moe",
}
_OUTSIDE = {  # role: names that may stand anywhere in a path outside the blocks
    "embed": "embed_tokens shared wte word_embeddings embed_in token_embedding tok_embeddings "
    "patch_embedding patch_embeddings",
    "position": "embed_positions wpe position_embeddings position_embedding rel_embeddings",
    "head": "lm_head embed_out proj_out cls vocab_transform vocab_projector",
    "classifier": "classifier score classification_head pre_classifier qa_outputs",
    "pooler": "pooler",
}
# q, k, v of head 0, then of head 1 ...
_BY_HEAD = frozenset("bloom falcon gpt_bigcode gpt_neox gpt_neox_japanese persimmon".split())
_IN_ORDER = frozenset("gpt2 imagegpt modernbert mpt phi3".split())  # all of q, all of k, all of v
_GATE_FIRST = {"glm", "glm4", "modernbert", "phi3"}  # the half that the activation sees comes first
_CROSS = frozenset("EncDecAttention crossattention cross_attn encoder_attn".split())
_POST_NORM = frozenset(  # the norm comes after the sum of a sub-layer and its residual
    "albert bart bert blenderbot-small camembert data2vec-text deberta deberta-v2 distilbert "
    "electra ernie layoutlm longformer marian mpnet openai-gpt plbart roberta xlm-roberta".split()
)
_PARALLEL = frozenset("codegen cohere cohere2 gptj phi".split())  # attention and MLP share a sum
_TOWERS = {  # tower: names that may stand anywhere in a path
    "vision": "vision_model vision_tower visual vision_embed_tokens",
    "audio": "audio_model audio_tower",
    "text": "text_model language_model",
}


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: role for role, names in table.items() for name in names.split()}


_INSIDE_ROLE, _OUTSIDE_ROLE, _TOWER = map(_by_name, (_INSIDE, _OUTSIDE, _TOWERS))


@dataclass(frozen=True)
class Layout:
    """Where everything is in one model: blocks, and the role, block and tower of a path."""

    blocks: tuple[str, ...]  # paths, first to last; an encoder's before its decoder's
    towers: tuple[str, ...]  # of each block
    roles: dict[str, dict[str, Rows | None]]  # path: {role: rows}; several roles in a fused linear
    names: dict[str, str]  # path: one role; a fused linear's is `qkv` or `gate_up`
    attention_cores: tuple[str, ...]  # what calls the attention function: parents of q or qkv

    def roles_of(self, path: str) -> dict[str, Rows | None]:
        """Every role of the module, with its ranges of output rows; None means all of them."""
        return self.roles.get(path, {})

    def role_of(self, path: str) -> str | None:
        """q ... down, embed, head, classifier, norm, attention, mlp, block, model; else None."""
        return self.names.get(path)

    def block_of(self, path: str) -> int | None:
        """Index, within its stack, of the block around (or at) the path; None outside of blocks."""
        around = self.block_path_of(path)
        return None if around is None else int(around.rsplit(".", 1)[1])

    def block_path_of(self, path: str) -> str | None:
        """Path of the block around (or at) the path."""
        return next((p for p in _parents(path) if self.names.get(p) == "block"), None)

    def tower_of(self, path: str) -> str | None:
        """text, vision, audio, encoder or decoder for paths in a block; None elsewhere."""
        around = self.block_path_of(path)
        return None if around is None else self.towers[self.blocks.index(around)]


def is_cross(path: str) -> bool:
    """Whether the path lies in a cross-attention."""
    return not _CROSS.isdisjoint(path.split("."))


def residual_of(model: nn.Module, path: str) -> str:
    """How sub-layers join the residual stream around the path: `pre` (h = r + f(norm(r))), `post`
    (h = norm(r + f(r))) or `parallel` (pre, attention and MLP in one sum).
    """
    config = _config(path, dict(model.named_modules()))
    family = getattr(config, "model_type", None)
    flags = ("do_layer_norm_before", "do_stable_layer_norm")  # OPT; wav2vec 2.0
    if family in _POST_NORM or not all(getattr(config, flag, True) for flag in flags):
        return "post"
    shared = any(
        getattr(config, flag, False) for flag in ("parallel_attn", "use_parallel_residual")
    )
    return "parallel" if shared or family in _PARALLEL else "pre"


def layout(model: nn.Module) -> Layout:
    """Read the roles off the names and classes of the modules. Deltas in the model are left out."""
    modules = {p: m for p, m in model.named_modules() if "deltas" not in p.split(".")}
    blocks = tuple(_find_blocks(modules))
    names: dict[str, str] = {"": "model"} | dict.fromkeys(blocks, "block")
    for path, module in modules.items():
        inside = any(names.get(parent) == "block" for parent in _parents(path)[1:])
        role = _role(path, module, inside)
        if role and path not in names:
            names[path] = role
    roles = {path: _split(path, role, modules) for path, role in names.items()}
    cores = dict.fromkeys(
        path.rpartition(".")[0] for path, role in names.items() if role in ("q", "qkv")
    )
    return Layout(blocks, tuple(_tower(model, p) for p in blocks), roles, names, tuple(cores))


def _parents(path: str) -> list[str]:
    """The path itself, then what contains it, inner to outer."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _ends(path: str) -> list[str]:
    """Ends of the path, longest first."""
    parts = path.split(".")
    return [".".join(parts[n:]) for n in range(len(parts))]


def _role(path: str, module: nn.Module, inside: bool) -> str | None:
    if "norm" in type(module).__name__.lower():
        return "norm"
    if inside:
        return _inside_role(path)
    if next(module.parameters(), None) is None:  # an activation in a classifier
        return None
    return outside_role(path)


def outside_role(path: str) -> str | None:
    """The role that a path outside of the blocks says: embed, position, head, classifier ..."""
    return next((_OUTSIDE_ROLE[part] for part in path.split(".") if part in _OUTSIDE_ROLE), None)


def _inside_role(path: str) -> str | None:
    return next((_INSIDE_ROLE[end] for end in _ends(path) if end in _INSIDE_ROLE), None)


def _find_blocks(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Members of the innermost lists with attention and an MLP in one; else of the longest."""
    lists = {p: m for p, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)}
    whole = [p for p, m in lists.items() if any(_is_block(member) for member in m)]
    stacks = [p for p in whole if not any(q.startswith(p + ".") for q in whole)]
    if not stacks and lists:
        stacks = [max(lists, key=lambda p: len(lists[p]))]
    for path in stacks:
        yield from (f"{path}.{n}" for n, _ in lists[path].named_children())


def _is_block(module: nn.Module) -> bool:
    found = {_inside_role(path) for path, _ in module.named_modules()}
    return bool(found & {"o", "q", "qkv"}) and bool(found & {"down", "experts"})


def _tower(model: nn.Module, path: str) -> str:
    parts = path.split(".")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return next((part for part in parts if part in ("encoder", "decoder")), "decoder")
    alone = "vision" if getattr(model, "main_input_name", "") == "pixel_values" else "text"
    return next((_TOWER[part] for part in parts if part in _TOWER), alone)


def _split(path: str, role: str, modules: dict[str, nn.Module]) -> dict[str, Rows | None]:
    """Roles within one module: several, with their rows, in a fused linear that we know."""
    if role not in ("qkv", "gate_up"):
        return {role: None}
    config = _config(path, modules)
    family = getattr(config, "model_type", None)
    d_out = _out_features(modules[path])
    if role == "gate_up" and family in _GATE_FIRST:
        return _interleave(1, gate=d_out // 2, up=d_out // 2)
    if role == "qkv" and path.endswith("crossattention.c_attn"):
        return _interleave(1, k=d_out // 2, v=d_out // 2)
    if role == "qkv" and family in _BY_HEAD | _IN_ORDER:
        D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = (d_out // D - config.num_attention_heads) // 2  # GQA: fewer than heads; MQA: 1
        groups = kv_heads if family in _BY_HEAD else 1
        kv = kv_heads * D // groups
        return _interleave(groups, q=d_out // groups - 2 * kv, k=kv, v=kv)
    return {role: None}


def _config(path: str, modules: dict[str, nn.Module]) -> Any:
    """The configuration nearest around the path: a tower's own, where towers differ."""
    around = (modules[p] for p in (*_parents(path), "") if p in modules)
    return next((module.config for module in around if hasattr(module, "config")), None)


def _interleave(groups: int, **sizes: int) -> dict[str, Rows | None]:
    """Ranges of each part, where `groups` equal groups of rows hold the parts in turn."""
    rows: dict[str, list[tuple[int, int]]] = {part: [] for part in sizes}
    start = 0
    for _ in range(groups):
        for part, size in sizes.items():
            rows[part].append((start, start + size))
            start += size
    return {part: tuple(ranges) for part, ranges in rows.items()}


def _out_features(module: nn.Module) -> int:
    """Output rows; Conv1D calls them nf."""
    d_out: Any = getattr(module, "nf", None) or module.out_features
    return d_out
