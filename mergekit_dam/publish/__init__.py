"""What others see of a merge: the report page, the model card, the push to the Hub."""
