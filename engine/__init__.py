"""One model on one device: weights, paged KV pool, prefix cache, scheduler, runner, sampler.

It must not know the network: events go in, a StepPlan is executed, outputs come out.
"""
