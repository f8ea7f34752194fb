"""The steps of all rules, element by element: what the forward and the backward kernel share.

`numbers` are `types.Coefficients`; mu and gamma, which may be learned, stand beside them.
"""

import triton
import triton.language as tl


@triton.jit
def step_forward(
    f, s0, s1, s2, mu, gamma, numbers,
    KIND: tl.constexpr,
    FROM_STATE: tl.constexpr,
):  # fmt: skip
    """(step, new states). Of the states, a rule has the first one, two or three.

    FROM_STATE: of the rules with one state, f holds the new state instead of the experts' output.
    """
    n0, n1, n2 = s0, s1, s2
    step = f
    if KIND == "adam" or KIND == "mars":
        n0 = numbers.beta1 * s0 + numbers.rest1 * f
        n1 = numbers.beta2 * s1 + numbers.rest2 * f * f
        step = gamma * n0 / tl.sqrt(n1 + numbers.eps)
    elif KIND == "ademamix":
        n0 = numbers.beta1 * s0 + numbers.rest1 * f
        n1 = numbers.beta2 * s1 + numbers.rest2 * f * f
        n2 = numbers.beta3 * s2 + numbers.rest3 * f
        mixed = numbers.scale1 * n0 + numbers.alpha * n2
        step = gamma * mixed / (tl.sqrt(numbers.scale2 * n1) + numbers.eps)
    else:
        if FROM_STATE:
            n0 = f
            push = f - mu * s0
        elif KIND == "signum":
            push = gamma * tl.where(f > 0, 1.0, tl.where(f < 0, -1.0, f))
            n0 = mu * s0 + push
        else:
            push = gamma * f
            n0 = mu * s0 + push
        step = n0
        if KIND == "nesterov":
            step = mu * n0 + push
    return step, n0, n1, n2


@triton.jit
def step_backward(
    d, f, s0, n0, n1, n2, g0, g1, g2, mu, gamma, numbers,
    KIND: tl.constexpr,
):  # fmt: skip
    """Gradients of f, the old states, mu and gamma.

    `d` is the gradient of the step, g0, g1, g2 those of the new states.
    """
    zero = tl.zeros_like(d)
    d0, d1, d2, dmu, dgamma = zero, zero, zero, zero, zero
    if KIND == "adam" or KIND == "mars":
        inverse = 1.0 / tl.sqrt(n1 + numbers.eps)
        t0 = g0 + d * gamma * inverse
        t1 = g1 - 0.5 * d * gamma * n0 * inverse * inverse * inverse
        df = numbers.rest1 * t0 + 2.0 * numbers.rest2 * f * t1
        d0 = numbers.beta1 * t0
        d1 = numbers.beta2 * t1
        dgamma = d * n0 * inverse
    elif KIND == "ademamix":
        root = tl.sqrt(numbers.scale2 * n1)
        inverse = 1.0 / (root + numbers.eps)
        mixed = numbers.scale1 * n0 + numbers.alpha * n2
        t0 = g0 + d * gamma * numbers.scale1 * inverse
        slope = tl.where(n1 > 0, 0.5 * numbers.scale2 / tl.where(n1 > 0, root, 1.0), 0.0)
        t1 = g1 - d * gamma * mixed * inverse * inverse * slope
        t2 = g2 + d * gamma * numbers.alpha * inverse
        df = numbers.rest1 * t0 + 2.0 * numbers.rest2 * f * t1 + numbers.rest3 * t2
        d0 = numbers.beta1 * t0
        d1 = numbers.beta2 * t1
        d2 = numbers.beta3 * t2
        dgamma = d * mixed * inverse
    elif KIND == "nesterov":
        t0 = g0 + mu * d
        df = gamma * (t0 + d)
        d0 = mu * t0
        dmu = t0 * s0 + d * n0
        dgamma = (t0 + d) * f
    else:
        t0 = g0 + d
        df = gamma * t0 if KIND == "linear" else zero
        d0 = mu * t0
        dmu = t0 * s0
        dgamma = t0 * f
    return df, d0, d1, d2, dmu, dgamma
