"""An OpenAI-compatible server of a frozen decoder or a composed pair."""
