"""The commands of `tfkit` that have a family of their own, and what all commands share."""
