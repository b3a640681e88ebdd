"""tfkit: make Keras 3 models small and fast, and put them on phones, with measured proof.

Importing the package is cheap: TensorFlow is loaded by the family that needs it, e.g. `import tfkit.compression`.
"""

__version__ = "0.1.0"
