"""Make trials: one file a task or suite, one row in :mod:`~focus_core.evaluation.tasks.registry` each."""
