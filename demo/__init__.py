"""`python -m demo`: fine-tune a pretrained encoder under an adaptive rank budget, beside HF peft."""
