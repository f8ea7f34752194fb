"""Triton kernels compiled for chips that are not here, and what their machine code says.

`launches` records what the ops launch, `compiler` compiles it as a GPU would, `machine_code` reads
figures from the result, `facts` compares them with those in the repository. `python -m aot` runs
all of it in a process without TRITON_INTERPRET, which decorated kernels would obey.
"""
