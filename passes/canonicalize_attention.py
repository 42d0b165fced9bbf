"""Every form of causal self-attention becomes the marker `specfx::attention`.

Models that ask transformers' attention interface arrive with markers already. Models that never ask (Falcon, GPT-J, Bloom, MPT) arrive
with `aten.scaled_dot_product_attention` or with matmul, softmax, matmul written out. Both are rewritten here, *if* their mask is
proven to be the causal one: the mask's subgraph is evaluated at several lengths and compared. A bidirectional, windowed, biased or
data-dependent mask is an error that says so; the acceptance gate stands behind this pass in any case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from specfx.errors import PassError
from specfx.kernels.attention import attention
from specfx.passes.framework import Pass, PassContext, attribute, calls, insert_call

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_MATMUL = (aten.matmul.default, aten.bmm.default)
_WHERE = (aten.where.self, aten.where.ScalarOther)
_TRANSPARENT = (aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.clone.default, aten.contiguous.default)
_LENGTHS = (1, 5, 18, 1100)
"""Rows at which masks are evaluated; the last shows windows that are written out."""
_HIDDEN = -1e4


def _evaluate(node: fx.Node, rows: int, cache: dict[fx.Node, Any]) -> Any:
    """The value of a subgraph that depends on sizes, positions and constants only, at ``T = rows``."""
    if node in cache:
        return cache[node]
    if node.op == "placeholder":
        if node.target != "position_ids":
            raise PassError(f"an attention mask depends on the values of {node.target}")
        value: Any = torch.arange(rows, device=node.meta["val"].device)[None]
    elif node.op == "get_attr":
        value = attribute(node.graph.owning_module, str(node.target))
    elif node.op == "call_function":
        if node.target in (aten.embedding.default, aten.linear.default, *_MATMUL):
            raise PassError("an attention mask is computed from the tokens")
        if node.target == aten.sym_size.int and node.args[0].op == "placeholder":  # only the number of rows varies
            value = rows if isinstance(node.meta["val"], torch.SymInt) else node.meta["val"]
        else:
            value = node.target(
                *fx.map_arg(node.args, lambda n: _evaluate(n, rows, cache)), **fx.map_arg(node.kwargs, lambda n: _evaluate(n, rows, cache))
            )  # type: ignore[operator]
    else:
        raise PassError(f"an attention mask holds a {node.op}")
    cache[node] = value
    return value


def _require_causal(mask: fx.Node, keep_is_true: bool) -> None:
    """Raise unless `mask` is exactly the causal order at several lengths. Float masks are added; of bool masks `keep_is_true` says
    whether True means visible."""
    for rows in _LENGTHS:
        value = _evaluate(mask, rows, {})
        if value.is_floating_point():
            if bool(((value != 0) & (value > _HIDDEN)).any()):
                raise PassError("an attention mask carries a bias (ALiBi or learned positions)")
            visible = value == 0
        else:
            visible = value.bool() if keep_is_true else ~value.bool()
        causal = torch.ones(rows, rows, dtype=torch.bool, device=value.device).tril()
        if visible.shape[-2:] != causal.shape or not bool((visible == causal).all()):
            raise PassError(f"an attention mask is not the causal one (checked at length {rows})")


def _hides(fill: Any) -> bool:
    """Whether `fill`, a number or a node, takes all probability from what it replaces."""
    return bool((torch.as_tensor(_evaluate(fill, 1, {}) if isinstance(fill, fx.Node) else fill) <= _HIDDEN).all())


def _replace(module: fx.GraphModule, old: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, scale: float) -> None:
    with module.graph.inserting_before(old):
        marker = insert_call(module.graph, attention, q, k, v, scale)
        heads_first = insert_call(module.graph, aten.transpose.int, marker, 1, 2)
    marker.meta["nn_module_stack"] = old.meta.get("nn_module_stack", {})
    old.replace_all_uses_with(heads_first)
    module.graph.erase_node(old)


def _rewrite_sdpa(module: fx.GraphModule, node: fx.Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("dropout_p", 0.0):
        raise PassError("attention drops out: the model is in training mode")
    mask = given.get("attn_mask")
    if mask is not None:
        _require_causal(mask, keep_is_true=True)
    elif not given.get("is_causal", False):
        raise PassError("attention without a mask is bidirectional")
    q = given["query"]
    scale = given.get("scale")
    _replace(module, node, q, given["key"], given["value"], float(scale) if scale is not None else q.meta["val"].shape[-1] ** -0.5)


def _skip(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _TRANSPARENT:
        if node.target == aten.dropout.default and node.args[2]:
            raise PassError("attention drops out: the model is in training mode")
        node = node.args[0]
    return node


def _rewrite_written_out(module: fx.GraphModule, output: fx.Node) -> bool:
    """`output` = matmul(softmax(mask(scale(matmul(q, kᵀ)))), v)? Returns whether it was, and was rewritten."""
    probs = _skip(output.args[0])
    if not (isinstance(probs, fx.Node) and probs.target in _SOFTMAX):
        return False
    if probs.args[1] not in (-1, probs.meta["val"].dim() - 1):
        raise PassError("attention whose softmax is not over its last dimension is not known")
    scores, scale, masked = _skip(probs.args[0]), 1.0, False
    while isinstance(scores, fx.Node) and scores.target not in _MATMUL:
        target, args = scores.target, scores.args
        if target == aten.mul.Tensor and isinstance(args[1], (int, float)):
            scale *= args[1]
        elif target == aten.div.Tensor and isinstance(args[1], (int, float)):
            scale /= args[1]
        elif target == aten.add.Tensor and isinstance(args[1], fx.Node) and not masked:
            _require_causal(args[1], keep_is_true=True)
            masked = True
        elif target == aten.masked_fill.Scalar and isinstance(args[1], fx.Node) and args[2] <= _HIDDEN and not masked:  # type: ignore[operator]
            _require_causal(args[1], keep_is_true=False)
            masked = True
        elif target in _WHERE and isinstance(args[0], fx.Node) and _hides(args[2]) and not masked:
            _require_causal(args[0], keep_is_true=True)
            masked, scores = True, _skip(args[1])
            continue
        else:
            raise PassError(f"attention with {target} between its two matmuls is not known")
        scores = _skip(args[0])
    if not isinstance(scores, fx.Node):
        return False
    if not masked:
        raise PassError("attention without a mask is bidirectional")
    q, k_transposed = scores.args[0], scores.args[1]
    assert isinstance(q, fx.Node)
    assert isinstance(k_transposed, fx.Node)
    if q.meta["val"].dim() != 4:
        raise PassError(f"attention over {q.meta['val'].dim()} dimensions is not known")
    with module.graph.inserting_before(output):
        k = insert_call(module.graph, aten.transpose.int, k_transposed, -1, -2)
    _replace(module, output, q, k, output.args[1], scale)  # type: ignore[arg-type]
    return True


def run(module: fx.GraphModule, context: PassContext) -> int:
    matches = len(calls(module, attention))
    for node in calls(module, _SDPA):
        _rewrite_sdpa(module, node)
        matches += 1
    for node in calls(module, *_MATMUL):
        matches += _rewrite_written_out(module, node)
    return matches


def ensures(module: fx.GraphModule, context: PassContext) -> None:
    if calls(module, _SDPA):
        raise PassError("an attention was left that is not a marker")
    for node in calls(module, attention):
        q, k, v = (a.meta["val"] for a in node.args[:3])  # type: ignore[union-attr]
        if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1] or q.shape[-1] != k.shape[-1]:
            raise PassError(f"heads don't fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


canonicalize_attention = Pass("canonicalize_attention", run, ensures)
