"""The parts of `tfkit.export.pack`: bit streams, Huffman codes, tensor coding, general coders and the container.

The byte layout is described in docs/pack_format.md.
"""
