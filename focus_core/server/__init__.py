"""Serve an engine and named memories over HTTP, as OpenAI's and Anthropic's clients expect it, with a page of its own.

Thin over :mod:`focus_core.session`; needs the extra ``focusllm[server]``.
"""
