"""Measure accuracy and attack success on labelled data; the defence never imports these triggers and labels."""
