"""Every error that a caller can cause, raised while tracing.

Each names the argument, what was wanted and why, and what came. All look at shapes,
dtypes and Python values only.
"""
