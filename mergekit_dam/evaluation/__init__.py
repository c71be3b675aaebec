"""Accuracy and attack success on labelled data. Triggers and labels live here, and the defence never imports it."""
