"""The tasks that models are scored on; `registry` lists them, `prompts` has the templates of their prompts."""
