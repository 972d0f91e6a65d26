"""MedBLIP: reads a 3-D brain MRI with the text of a health record and answers in words."""

__version__ = "0.1.0"
