"""How much does a method learn from a small training set, and how much does it disturb everything else?"""
