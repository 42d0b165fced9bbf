"""A fixed story with a suffix drafter, told by whoever runs it: what it drafts doesn't depend on how its code is run.

``python suffix_scenario.py`` prints it as JSON, with what the drafter says about itself.
"""

from __future__ import annotations

import json
from typing import Any

from streams import long_streams

from specfx.drafters.suffix import SuffixDrafter
from specfx.options import SuffixOptions


def story() -> dict[str, Any]:
    """Requests that write, draft, end and are evicted; every draft in order, and what was learned."""
    drafts: list[tuple[Any, ...]] = []
    for tree in (True, False):
        drafter = SuffixDrafter(SuffixOptions(max_cached_tokens=400, use_tree_spec=tree), 15)
        streams = [[*stream, 2**31 - 1, *stream[:20]] for stream in long_streams(120).values()]
        for seq, stream in enumerate(streams):
            drafter.add(seq, stream[:30], [51])
            for at in range(30, len(stream) - 3, 3):
                drafter.accept(seq, stream[at : at + 3])
                (draft,) = drafter.propose([seq], [15])
                drafts.append((draft.tokens, draft.parents, draft.probs))
            if seq:
                drafter.remove(seq - 1, stream[-3:])
        drafter.evict(100)
        drafts.append((drafter._model.tolist(), drafter.cache.tokens, drafter.cache.evicted))
    return {"drafts": drafts, "refusals": [refusal.reason.name for refusal in drafter.refusals]}


if __name__ == "__main__":
    print(json.dumps(story()))
