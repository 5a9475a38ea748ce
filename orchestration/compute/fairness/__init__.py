"""Fairness and diversity: who is shown against what people want of them, whom the lists serve well, how mixed they are."""
