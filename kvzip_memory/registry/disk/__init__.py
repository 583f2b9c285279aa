"""The disk tier: contexts in a folder that any number of processes share.

Layout of the folder (0700, files 0600)::

    FORMAT                        version of this layout; a newer one is left alone
    SECRET                        if it was made with one, what only the same one gives
    blobs/ab/<key>.safetensors    the contexts; each file says itself what it is and is checked whole before it is used
    blobs/.tmp/                   files being written: beside the others, for blobs/ may be a mount of its own
    names/                        what each name means, see :mod:`~kvzip_memory.registry.disk.names`
    index/                        diskcache: one row a context, in the order of use; can be made anew from the blobs
    locks/                        one file lock for each 3 hex digits of a key, held while a context is built or written
    quarantine/                   files that failed their checks, with the reason in the index

What does not look like that, see :mod:`~kvzip_memory.registry.disk.layout`, is left alone and counted nowhere.
"""
