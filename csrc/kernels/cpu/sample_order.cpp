#include "sample_order.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace lipfast {
namespace {

constexpr int kPowerIterations = 2;   // more of them hardly make the groups tighter
constexpr int64_t kCoordinates = 32;  // evenly spaced; so many say which samples are alike, and cost little

typedef float Vector __attribute__((vector_size(16)));
constexpr int64_t kVectors = kCoordinates / 4;
constexpr int64_t kProbes = 64;  // samples that tell a direction

// Some coordinates of a sample, filled up with zeros. NaN and what overflows are 0 too: comparisons need an order.
struct Point {
  Vector at[kVectors];
};

template <class T>
Point point_of(const T* row, int64_t length) {
  float values[kCoordinates] = {};
  const int64_t count = std::min(length, kCoordinates);
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<float>(row[i * length / count]);
    values[i] = std::abs(value) < 1e15f ? value : 0;  // squares of sums of squares stay finite
  }
  Point point;
  std::memcpy(&point, values, sizeof(point));
  return point;
}

float dot(const Point& a, const Point& b) {
  Vector sum{};
  for (int64_t i = 0; i < kVectors; ++i) sum += a.at[i] * b.at[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
void add(float factor, const Point& a, Point& to) {
  for (int64_t i = 0; i < kVectors; ++i) to.at[i] += factor * a.at[i];
}

// A sample, and where it lies along the direction of the next cut.
struct Keyed {
  float key;
  int64_t index;  // within the block
};

// Where points spread most: power iterations with the covariance of some of them, from the one farthest from the mean.
Point widest_direction(const Point* points, const Keyed* chosen, int64_t count) {
  const int64_t step = (count + kProbes - 1) / kProbes;
  std::vector<Point> probes;
  for (int64_t i = 0; i < count; i += step) probes.push_back(points[chosen[i].index]);
  Point mean{};
  for (const Point& probe : probes) add(1.0f / static_cast<float>(probes.size()), probe, mean);
  for (Point& probe : probes) add(-1, mean, probe);
  Point direction = *std::max_element(probes.begin(), probes.end(),
                                      [](const Point& a, const Point& b) { return dot(a, a) < dot(b, b); });
  for (int iteration = 0; iteration < kPowerIterations; ++iteration) {
    const float squares = dot(direction, direction);
    if (!(squares > 0)) break;
    Point next{};
    for (const Point& probe : probes) add(dot(probe, direction) / squares, probe, next);
    direction = next;
  }
  return direction;
}

void cut(const Point* points, Keyed* chosen, int64_t count, int64_t group) {
  if (count <= group) {
    std::sort(chosen, chosen + count, [](const Keyed& a, const Keyed& b) { return a.index < b.index; });
    return;
  }
  const Point direction = widest_direction(points, chosen, count);
  for (int64_t i = 0; i < count; ++i) {
    const float key = dot(points[chosen[i].index], direction);
    chosen[i].key = std::isfinite(key) ? key : 0;
  }
  const int64_t half = (count / 2 + group - 1) / group * group;
  std::nth_element(chosen, chosen + half, chosen + count,
                   [](const Keyed& a, const Keyed& b) { return a.key != b.key ? a.key < b.key : a.index < b.index; });
  cut(points, chosen, half, group);
  cut(points, chosen + half, count - half, group);
}

template <class T>
void order_samples_of(const T* x, int64_t length, int64_t begin, int64_t end, int64_t group, int64_t* order) {
  std::vector<Point> points;
  std::vector<Keyed> chosen;
  for (int64_t i = begin; i < end; ++i) {
    points.push_back(point_of(x + i * length, length));
    chosen.push_back({0, i - begin});
  }
  cut(points.data(), chosen.data(), end - begin, group);
  for (const Keyed& sample : chosen) *order++ = begin + sample.index;
}

}  // namespace

void order_samples(const void* x, Dtype dtype, int64_t length, int64_t begin, int64_t end, int64_t group,
                   int64_t* order) {
  if (dtype == Dtype::kFloat32)
    return order_samples_of(static_cast<const float*>(x), length, begin, end, group, order + begin);
  order_samples_of(static_cast<const double*>(x), length, begin, end, group, order + begin);
}

}  // namespace lipfast
