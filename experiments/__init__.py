"""Studies of Lipschitz bounds across training and model size: `python -m experiments list`.

Trains families of small networks, saves checkpoints, scores them with `lipfast score` and draws
the result, after Khromov and Singh, ICLR 2024 (arXiv 2302.10886). Not part of the wheel.
"""
