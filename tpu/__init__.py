"""What a TPU needs, each in a room of its own; `pipeline` alone comes in here.

resolve.py   a name, the environment or `local` becomes a `tf.distribute.TPUStrategy`
lint.py      what in a traced update a TPU cannot compute, by layer; needs nothing but TensorFlow
check.py     the update compiled by the real XLA:TPU compiler, without a TPU
compiler.py  the process that does it; jax and libtpu are imported there and nowhere else
targets.py   chips and their memory
"""
