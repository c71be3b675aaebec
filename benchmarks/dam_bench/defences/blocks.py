"""Name the parts of a block: query, key, value and output of attention, and the two layers of the feed-forward part."""

from __future__ import annotations

import re

from mergekit_dam.errors import DamError
from mergekit_dam.tasks import Task

# in the order of the flow of data; a layer that computes query, key and value together is the query
PARTS: dict[str, str] = {
    "query": r"(query|q_proj|q_lin|c_attn|query_key_value)$",
    "key": r"(key|k_proj|k_lin)$",
    "value": r"(value|v_proj|v_lin)$",
    "output": r"(attention\.output\.dense|out_proj|o_proj|out_lin|attn\.c_proj|attention\.dense)$",
    "up": r"(fc1|intermediate\.dense|gate_proj|up_proj|lin1|c_fc|dense_h_to_4h)$",
    "down": r"(fc2|down_proj|lin2|mlp\.c_proj|dense_4h_to_h|^output\.dense)$",
}


def blocks_in_order(task: Task) -> list[str]:
    """Names of the task's blocks, first to last."""
    return list(dict.fromkeys(task.block_of.values()))


def parts_of(task: Task) -> dict[tuple[int, str], list[str]]:
    """Output names of the tensors of each part, by the block's index and the part's name.

    Raises:
        DamError: no part has a name that is known.
    """
    order = {block: index for index, block in enumerate(blocks_in_order(task))}
    found: dict[tuple[int, str], list[str]] = {}
    for name, target in task.targets.items():
        block = task.block_of.get(target)
        if block is None:
            continue
        layer = target.removeprefix(f"{block}.").rpartition(".")[0]
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, layer)), None)
        if part is not None:
            found.setdefault((order[block], part), []).append(name)
    if not found:
        raise DamError(
            f"model {task.name}",
            expected="blocks with layers of known names",
            got=", ".join(blocks_in_order(task)[:2]) or "no blocks",
            cure="Add the names of its layers to defences/blocks.py.",
        )
    return found
