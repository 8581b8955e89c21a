"""Everything that only a GPU can tell, in one command: tests, kernels, a layer, retention on an 8B-shaped model, and,
where there are two, what two ranks do.

``python -m bench.gpu_check`` takes under nine minutes, needs no network, and writes one JSON. ``--dry-run`` goes
through every section on a CPU, kernels in Triton's interpreter, at sizes that take a minute: it measures nothing, it
keeps the check from breaking while no GPU is at hand.
"""
