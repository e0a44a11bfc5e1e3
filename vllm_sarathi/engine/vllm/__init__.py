"""The one touch point for vLLM internals: every name of vLLM's, those imported by string, too.

vLLM says that its scheduler interface is not public. What we lean on is listed in `contract`, which compares it
with the vLLM that is installed, so that an upgrade fails in one place, with a sentence that says what moved.

Importing this package imports no vLLM: the plugin is loaded in every vLLM process, and must cost nothing there.
"""
