"""Codecs: tensors to bytes and back. They decide what crosses a pipeline boundary, and in how many bits. They know
nothing of protocol or node.
"""
