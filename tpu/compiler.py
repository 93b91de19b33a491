"""Compiler: a program of its own, which compiles one XLA program for a TPU that is not there.

    python tpu/compiler.py PROGRAM TARGET        prints one line of JSON

Run by `tpu.check` in a process of its own, because libtpu reads the environment when it loads, takes a lock, and may end the
process. It imports nothing of the house. jaxlib's own parts that it uses are private: setup.cfg pins the versions.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu",  # the program is compiled, not run
    TPU_SKIP_MDS_QUERY="1",  # there is no metadata server to ask
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)


def main(program: str, target: str) -> None:
    """Compiles the serialized HLO in the file `program` for one device of `target`, 'v5e:2x2'."""
    try:
        said = compile_for(pathlib.Path(program).read_bytes(), target)
    except Exception as error:  # whatever the compiler refuses is told in its own words
        said = {"refused": f"{type(error).__name__}: {error}"}
    print(json.dumps(said))


def compile_for(hlo: bytes, target: str) -> dict[str, Any]:
    """Memory of one device in bytes by kind, and the versions that compiled."""
    import importlib.metadata

    import jaxlib
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax.experimental import topologies
    from jaxlib import _jax
    from jaxlib.mlir import ir

    topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    device = topology.devices[0]
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        _drop_copies(module)
        options = compiler.get_compile_options(1, 1, device_assignment=np.array([[device.id]]))
        made = compiler.backend_compile_and_load(device.client, module, _jax.DeviceList((device,)), options, [])
        loops = "stablehlo.while" in str(module)
    memory = made.get_compiled_memory_stats()
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    costs = made.cost_analysis()
    return {
        "device": device.device_kind,
        "devices": len(topology.devices),
        "peak": int(memory.peak_memory_in_bytes),
        "memory": {kind: int(getattr(memory, f"{kind}_size_in_bytes")) for kind in kinds},
        # A loop's body is counted once, however often it runs.
        "flops": None if loops else float((costs[0] if isinstance(costs, list) else costs).get("flops", 0.0)),
        "versions": {"jaxlib": jaxlib.__version__, "libtpu": importlib.metadata.version("libtpu")},
    }


def _drop_copies(module: Any) -> None:
    """Takes out `mhlo.copy`, which TensorFlow's lowering leaves and the TPU's compiler cannot take."""
    for operation in [each for each in _nested(module.operation) if each.name == "mhlo.copy"]:
        operation.results[0].replace_all_uses_with(operation.operands[0])
        operation.erase()


def _nested(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for each in block.operations:
                yield each.operation
                yield from _nested(each.operation)


if __name__ == "__main__":
    main(*sys.argv[1:])
