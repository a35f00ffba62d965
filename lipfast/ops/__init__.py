"""Typed wrappers of the native ops, one file per stem: arguments checked, fake kernels registered.

A wrapper raises errors in the caller's terms before the op is called; the op checks again.
"""

from lipfast import _native as _native  # loads the extension, which registers the ops
