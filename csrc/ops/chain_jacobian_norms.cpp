// chain_jacobian_norms: per-sample Jacobian norms of chains. Schema, decoding of the stages and argument checks.
#include <limits>

#include "checks.h"

namespace lipfast {
namespace {

constexpr size_t kNumbers = 12;  // integers that describe one stage
constexpr int64_t kFlatten = 5;  // beyond StageKind: no stage of the kernel's
constexpr int64_t kActivations = 11;
constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max();  // the kernel's indices

// Walks through the stages; `shape` is that of a sample before the next one, `flat` after a Flatten.
struct Decoder {
  const std::vector<Tensor>& weights;
  std::string name;
  ImageShape shape;
  bool flat;
  int64_t affine = 0;

  ChainStage decode(const int64_t* numbers, const double* parameters) {
    ChainStage stage{};
    stage.kind = static_cast<StageKind>(numbers[0]);
    stage.activation = static_cast<Activation>(numbers[1]);
    for (int axis = 0; axis < 2; ++axis) {
      stage.kernel[axis] = numbers[2 + axis];
      stage.stride[axis] = numbers[4 + axis];
      stage.padding[axis] = numbers[6 + axis];
      stage.dilation[axis] = numbers[8 + axis];
      stage.parameters[axis] = parameters[axis];
      STD_TORCH_CHECK(stage.kernel[axis] > 0 && stage.stride[axis] > 0 && stage.padding[axis] >= 0 &&
                          stage.dilation[axis] > 0 && stage.kernel[axis] <= kMostElements &&
                          stage.stride[axis] <= kMostElements && stage.padding[axis] <= kMostElements &&
                          stage.dilation[axis] <= kMostElements,
                      name, ": kernel, stride, padding or dilation is out of range");
    }
    stage.groups = numbers[10];
    stage.count_include_pad = (numbers[11] & 1) != 0;
    stage.pixels = 1;
    stage.in = stage.out = shape;
    switch (stage.kind) {
      case StageKind::kLinear:
        decode_linear(stage);
        break;
      case StageKind::kConvolution:
        decode_convolution(stage);
        break;
      case StageKind::kMaxPool:
      case StageKind::kAveragePool:
        decode_pool(stage, (numbers[11] & 2) != 0);
        break;
      case StageKind::kActivation:
        STD_TORCH_CHECK(numbers[1] >= 0 && numbers[1] < kActivations, name, ": unknown activation ", numbers[1]);
        break;
      default:
        STD_TORCH_CHECK(false, name, ": unknown kind ", numbers[0]);
    }
    STD_TORCH_CHECK(elements(stage.out) <= kMostElements, name, ": more than 2^31 elements per sample");
    shape = stage.out;
    return stage;
  }

  const Tensor& take_weight(ChainStage& stage, int64_t dimensions) {
    stage.affine = affine++;
    const Tensor& weight = weights[static_cast<size_t>(stage.affine)];
    STD_TORCH_CHECK(weight.dim() == dimensions && weight.numel() > 0, name, ": expected a weight of ", dimensions,
                    " dimensions, got ", text(weight));
    return weight;
  }

  void decode_linear(ChainStage& stage) {
    const int64_t inputs = elements(shape);
    STD_TORCH_CHECK(flat, name, ": a linear stage takes a flat sample");
    const Tensor& weight = take_weight(stage, 2);
    STD_TORCH_CHECK(weight.size(1) == inputs, name, ": expected a weight n x ", inputs, ", got ", text(weight));
    // Of one channel or one pixel, both orders of the columns are the same.
    stage.pixels = shape.channels == 1 ? 1 : shape.height * shape.width;
    stage.in = {inputs, 1, 1};
    stage.out = {weight.size(0), 1, 1};
    stage.groups = 1;
  }

  void decode_convolution(ChainStage& stage) {
    STD_TORCH_CHECK(!flat, name, ": a convolution takes an image");
    const Tensor& weight = take_weight(stage, 4);
    const int64_t groups = stage.groups;
    STD_TORCH_CHECK(groups > 0 && shape.channels % groups == 0 && weight.size(0) % groups == 0 &&
                        weight.size(1) == shape.channels / groups && weight.size(2) == stage.kernel[0] &&
                        weight.size(3) == stage.kernel[1],
                    name, ": a weight ", text(weight), " does not fit ", shape.channels, " channels in ", groups,
                    " groups and a kernel ", stage.kernel[0], " x ", stage.kernel[1]);
    stage.out.channels = weight.size(0);
    stage.out.height = windows(stage, 0, shape.height, false);
    stage.out.width = windows(stage, 1, shape.width, false);
    STD_TORCH_CHECK(
        (shape.height + 2 * stage.padding[0]) * (shape.width + 2 * stage.padding[1]) <= kMostElements / shape.channels,
        name, ": more than 2^31 elements per padded sample");
  }

  void decode_pool(ChainStage& stage, bool ceil_mode) {
    STD_TORCH_CHECK(!flat, name, ": a pool takes an image");
    stage.groups = 1;
    const bool average = stage.kind == StageKind::kAveragePool;
    STD_TORCH_CHECK(!average || (stage.dilation[0] == 1 && stage.dilation[1] == 1), name,
                    ": an average pool has no dilation");
    const int64_t sizes[2] = {shape.height, shape.width};
    for (int axis = 0; axis < 2; ++axis) {
      STD_TORCH_CHECK(2 * stage.padding[axis] <= stage.kernel[axis], name, ": padding is more than half of the window");
      const int64_t count = windows(stage, axis, sizes[axis], ceil_mode);
      (axis == 0 ? stage.out.height : stage.out.width) = count;
      for (int64_t i = 0; i < count; ++i) check_window(stage, axis, i, sizes[axis]);
    }
  }

  int64_t windows(const ChainStage& stage, int axis, int64_t size, bool ceil_mode) const {
    const int64_t stride = stage.stride[axis], padding = stage.padding[axis];
    const int64_t span = size + 2 * padding - stage.dilation[axis] * (stage.kernel[axis] - 1) - 1;
    STD_TORCH_CHECK(span >= 0 || (ceil_mode && span + stride > 0), name, ": the window is larger than the image");
    int64_t count = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    // The last window must start inside the image or its left padding.
    if (ceil_mode && (count - 1) * stride >= size + padding) --count;
    return count;
  }

  // A dilated window may hold nothing but padding: it has no maximum.
  void check_window(const ChainStage& stage, int axis, int64_t index, int64_t size) const {
    int64_t at = index * stage.stride[axis] - stage.padding[axis], tap = 0;
    for (; tap < stage.kernel[axis] && at < 0; ++tap) at += stage.dilation[axis];
    STD_TORCH_CHECK(tap < stage.kernel[axis] && at < size, name, ": a window lies wholly in the padding");
  }
};

}  // namespace

ChainStages check_chain_jacobian_norms(const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& biases, const std::vector<int64_t>& stages,
                                       const std::vector<double>& parameters) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 4,
                  "chain_jacobian_norms: x: expected (batch, n) or (batch, channels, "
                  "height, width), got ",
                  x.dim(), " dimensions");
  check_dense(x, x.dim(), "chain_jacobian_norms: x");
  const size_t count = stages.size() / kNumbers;
  STD_TORCH_CHECK(stages.size() == count * kNumbers && parameters.size() == 2 * count,
                  "chain_jacobian_norms: ", stages.size(), " numbers and ", parameters.size(),
                  " parameters do not describe stages");
  ChainStages result{};
  for (size_t i = 0; i < count; ++i) result.affine += stages[i * kNumbers] == 0 || stages[i * kNumbers] == 1;
  const auto affine = static_cast<size_t>(result.affine);
  STD_TORCH_CHECK(affine > 0, "chain_jacobian_norms: a chain needs a linear or a convolutional stage");
  STD_TORCH_CHECK(!weights.empty() && weights.size() % affine == 0 && biases.size() == weights.size(),
                  "chain_jacobian_norms: ", weights.size(), " weights and ", biases.size(), " biases for chains with ",
                  affine, " of each");
  const bool flat = x.dim() == 2;
  result.in = {x.size(1), flat ? 1 : x.size(2), flat ? 1 : x.size(3)};
  STD_TORCH_CHECK(result.in.channels > 0 && result.in.height > 0 && result.in.width > 0,
                  "chain_jacobian_norms: x: samples are empty");
  Decoder decoder{weights, "", result.in, flat};
  for (size_t i = 0; i < count; ++i) {
    decoder.name = "chain_jacobian_norms: stage " + std::to_string(i);
    const int64_t* numbers = stages.data() + i * kNumbers;
    if (numbers[0] == kFlatten) {
      decoder.flat = true;
    } else {
      result.stages.push_back(decoder.decode(numbers, parameters.data() + 2 * i));
      decoder.flat = decoder.flat || result.stages.back().kind == StageKind::kLinear;
    }
  }
  result.out = decoder.shape;
  check_networks(weights, biases, result.affine, x.scalar_type(), "chain_jacobian_norms");
  return result;
}

// weights, biases: network by network, affine stage by affine stage, kernels with two axes; an empty bias is none.
// stages: 12 numbers each: kind (StageKind; 5: Flatten), activation, kernel, stride, padding, dilation (height and
// width), groups, flags (1: count_include_pad, 2: ceil_mode). parameters: 2 each.
LIPFAST_SCHEMA(
    "chain_jacobian_norms(Tensor x, Tensor[] weights, Tensor[] biases, int[] stages, float[] parameters) -> (Tensor "
    "spectral, Tensor frobenius)")

}  // namespace lipfast
