# Every file of csrc/cpu/kernels is compiled once per instruction set, as far as the set has something new for it.
# FASTCNN_ISA names the set (the namespace and the table's symbol), FASTCNN_ISA_LEVEL is its rank, and
# csrc/cpu/dispatch.cpp learns what exists from FASTCNN_HAS_<isa>=1.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

set(FASTCNN_ISA_ORDER portable avx2 avx512 avx512_bf16 amx)
set(FASTCNN_FLAGS_portable "")
set(FASTCNN_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FASTCNN_FLAGS_avx512 ${FASTCNN_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(FASTCNN_FLAGS_avx512_bf16 ${FASTCNN_FLAGS_avx512} -mavx512bf16)
set(FASTCNN_FLAGS_amx ${FASTCNN_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)

# What takes a kernel from the set before it, and cannot be built alone.
set(FASTCNN_BASE_avx512_bf16 avx512)  # everything in float32 (csrc/cpu/by_dtype.h)
set(FASTCNN_BASE_amx avx512_bf16)     # all but these, which multiply matrices (csrc/cpu/dispatch.cpp)
set(FASTCNN_KERNELS_amx gemm_pack pointwise_forward pointwise_backward conv2d conv2d_backward separable
    inverted_residual)

# The kernels spell out their vectors, so -O2 with small loops unrolled gives the code of -O3 in 60 % of the time.
# Measured: equal speed for the depthwise and pointwise kernels; the fused ones lose 1 to 4 %, and keep -O3.
set(FASTCNN_KERNEL_FLAGS -O2 -fpeel-loops)
set(FASTCNN_O3_KERNELS separable inverted_residual)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(FASTCNN_FLAGS_portable -O1)  # for processors before 2013 here: 60 % of the compiler's time
endif()
if(FASTCNN_SANITIZE)
  set(FASTCNN_KERNEL_FLAGS "")
  set(FASTCNN_O3_KERNELS "")
endif()

# Sets `result` to whether the compiler can make code for this instruction set.
function(fastcnn_compiler_has isa result)
  if(isa STREQUAL "portable")
    set(${result} TRUE PARENT_SCOPE)
    return()
  endif()
  if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(${result} FALSE PARENT_SCOPE)
    return()
  endif()
  list(JOIN FASTCNN_FLAGS_${isa} " " CMAKE_REQUIRED_FLAGS)
  check_cxx_source_compiles("#include <immintrin.h>\nint main() { return 0; }" FASTCNN_COMPILES_${isa})
  set(${result} ${FASTCNN_COMPILES_${isa}} PARENT_SCOPE)
endfunction()

function(fastcnn_add_isas target)
  file(GLOB all_kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cpu/kernels/*.cpp)
  foreach(kernel IN LISTS FASTCNN_O3_KERNELS)
    # GCC takes a precompiled header for the same -O only.
    set_source_files_properties(${PROJECT_SOURCE_DIR}/csrc/cpu/kernels/${kernel}.cpp PROPERTIES
      COMPILE_OPTIONS -O3 SKIP_PRECOMPILE_HEADERS ON)
  endforeach()
  set(built "")
  foreach(isa IN LISTS FASTCNN_ISAS)
    list(FIND FASTCNN_ISA_ORDER "${isa}" level)
    if(level EQUAL -1)
      message(FATAL_ERROR "FASTCNN_ISAS: got '${isa}', expected a list of ${FASTCNN_ISA_ORDER}")
    endif()
    fastcnn_compiler_has(${isa} has)
    if(NOT has)
      message(STATUS "fastcnn: ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} on "
                     "${CMAKE_SYSTEM_PROCESSOR} makes no ${isa} code; leaving it out")
      continue()
    endif()
    if(FASTCNN_BASE_${isa} AND NOT FASTCNN_BASE_${isa} IN_LIST built)
      message(FATAL_ERROR "FASTCNN_ISAS: got '${isa}' without '${FASTCNN_BASE_${isa}}' before it")
    endif()
    list(APPEND built ${isa})
    target_compile_definitions(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:FASTCNN_HAS_${isa}=1>)
    set(kernels ${all_kernels})
    if(FASTCNN_KERNELS_${isa})
      list(TRANSFORM FASTCNN_KERNELS_${isa} REPLACE "(.+)" "${PROJECT_SOURCE_DIR}/csrc/cpu/kernels/\\1.cpp"
           OUTPUT_VARIABLE kernels)
    endif()
    add_library(fastcnn_${isa} OBJECT ${kernels})
    target_include_directories(fastcnn_${isa} PRIVATE csrc)
    target_compile_definitions(fastcnn_${isa} PRIVATE FASTCNN_ISA=${isa} FASTCNN_ISA_LEVEL=${level})
    # GCC 12 takes the undefined operands inside its own AVX-512 headers for mistakes (GCC bug 105593).
    target_compile_options(fastcnn_${isa} PRIVATE ${FASTCNN_CXX_FLAGS} ${FASTCNN_KERNEL_FLAGS} ${FASTCNN_FLAGS_${isa}}
      "$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>")
    target_precompile_headers(fastcnn_${isa} PRIVATE csrc/cpu/by_dtype.h)  # reading <immintrin.h> takes half a second
    target_link_libraries(fastcnn_${isa} PRIVATE OpenMP::OpenMP_CXX)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:fastcnn_${isa}>)
  endforeach()
  list(JOIN built ", " text)
  message(STATUS "fastcnn: CPU kernels for ${text}")
  set(FASTCNN_BUILT_ISAS ${built} PARENT_SCOPE)
endfunction()
