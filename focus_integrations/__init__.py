"""Connect focus_core to frameworks; each subpackage needs its framework's extra and nothing else imports it."""
