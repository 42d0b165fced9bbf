"""What was captured and compiled, kept on disk for the next process: a model of the same structure starts without capture or compiler.

1. `key` names a structure: the model's classes, configuration, and the shapes of its weights (never their values), the options, the
   versions and sources of all that takes part, and the machine. Each of these changes the name.
2. `graphs` turns a rewritten graph into plain data and back; weights stand in it by name and are bound to those of the model at hand.
3. `store` keeps the files, in a folder of `specfx.cache.cache_dir`: each is written under a temporary name and renamed, so that processes
   that start or die at any moment leave whole files, and each carries a checksum. A file that can't be used is built anew.
4. `shelf` puts the two artifacts of a structure there: the graph as the rewrite passes leave it (``.graph``), and the lowered graph with
   what Inductor made of it (``.lowered``).
5. `worker` starts a process that fills the shelf in the background: it is sent a `skeleton` of the model, and `build` is what it does.

An artifact is as trustworthy as the folder that it lies in (files are pickles, as Inductor's own are), and proves nothing: the acceptance
gate runs in each process on the engine that is to serve.
"""
