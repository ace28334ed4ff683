"""Training: recipes, schedules, the loop, portable state. No framework is imported here."""
