// The elementwise formulas, for a scalar or a vector of elements V and its scalar type T.

#ifndef NLCG_TF_FUSED_NLCG_UPDATE_FORMULAS_H_
#define NLCG_TF_FUSED_NLCG_UPDATE_FORMULAS_H_

#include <cmath>
#include <cstring>

#include "nlcg_update.h"

namespace nlcg {

template <typename V>
NLCG_HOST_DEVICE V Abs(V x) {
  return x < 0 ? -x : x;
}

template <typename V, typename T>
NLCG_HOST_DEVICE V HessianDiagonal(V h, V s, V y, T inv_shs, T inv_ys) {
  const V hs = h * s;
  // Each square is scaled as it is formed: y^2 alone overflows float32 beyond 1.8e19. An element that
  // overflows all the same keeps its value: an infinite h would never come back.
  const V updated = h - hs * (hs * inv_shs) + y * (y * inv_ys);
  return updated - updated == 0 ? Abs(updated) : h;
}

template <typename V, typename T>
NLCG_HOST_DEVICE V Forget(V h, T rate) {
  return h + rate * (T(1) - h);
}

// The direction, from the gradient and what it is divided by; and with other factors the look-ahead.
template <typename V, typename T>
NLCG_HOST_DEVICE V Direction(V g, V divisor, V d, T scale, T beta) {
  return beta * d - scale * (g / divisor);
}

template <typename V, typename T>
NLCG_HOST_DEVICE V Weight(V w, V d, T decay_rate, T step) {
  return w - w * decay_rate + step * d;
}

}  // namespace nlcg

#endif  // NLCG_TF_FUSED_NLCG_UPDATE_FORMULAS_H_
