"""The posteriors of ``tests/posteriors`` in other libraries, and their estimates of the evidence.

Install the libraries outside of the environment of this project, and run

    pip install --target /tmp/peers "jax[cpu]" blackjax dynesty pymc
    PYTHONPATH=/tmp/peers python -m benchmarks --only evidence_estimators
"""
