# _C: the Python module over the kernels.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 3.0 CONFIG REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)

file(GLOB GPTCORE_BINDING_SOURCES CONFIGURE_DEPENDS csrc/bindings/*.cpp)
pybind11_add_module(_C MODULE NO_EXTRAS ${GPTCORE_BINDING_SOURCES})
target_link_libraries(_C PRIVATE OpenMP::OpenMP_CXX)
target_include_directories(_C PRIVATE csrc)
include(csrc/layout.cmake)
target_compile_definitions(_C PRIVATE GPTCORE_VERSION="${SKBUILD_PROJECT_VERSION}" GPTCORE_LAYOUT="${GPTCORE_LAYOUT}")
# Binding code is glue: optimising it further costs build time and gains nothing. Most of a binding file's time
# goes to pybind11's own functions, so one large file.
target_compile_options(_C PRIVATE $<$<CONFIG:Release>:-Os>)
set_target_properties(_C PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
if(CMAKE_BUILD_TYPE STREQUAL "Release")
  target_link_options(_C PRIVATE $<$<PLATFORM_ID:Linux>:-Wl,-s>)
endif()
install(TARGETS _C LIBRARY DESTINATION gptcore)

set(GPTCORE_TARGET _C)
set(GPTCORE_THREADS OpenMP::OpenMP_CXX)
