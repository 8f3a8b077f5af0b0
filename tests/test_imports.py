"""What the package imports, and when."""

from __future__ import annotations

import subprocess
import sys

from tests.support import HANG_SECONDS

OPERATIONS = """
import sys
import torch
from concurrent_kv import DropOldest, KeysValues, KVCacheManager, KVLayout, KVPool

def row(length):
    return KeysValues.from_packed(torch.ones(2, 1, 1, length, 2))

pool = KVPool(KVLayout(1, 1, 2, 4), 2)
config = dict(num_layers=1, num_heads=1, embed_dim=2, context_length=4, num_simulations=2, max_cache_size=10)
manager = KVCacheManager(dict(config, device="cpu"), 1)
before = set(sys.modules)
for key in range(4):
    pool.put(key, row(3))
with pool.gather([2, 3]) as batch:
    batch.append(0, torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 2))
    pool.commit(["a", "b"], batch, overflow=DropOldest(4, 2))
pool.pin("a").close()
pool.get_or_compute("c", lambda: row(1))
pool.pop("c")
with manager.search([0]) as search:
    search.gather(["root"], [0]).close()
pool.clear()
pool.check_integrity()
pool.repair()
print(sorted(set(sys.modules) - before))
"""


def test_no_operation_imports_anything() -> None:
    """An import takes milliseconds, some under the mutex; and one that is cut off blocks every later one."""
    done = subprocess.run(
        [sys.executable, "-c", OPERATIONS], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    assert done.stdout.strip() == "[]"
