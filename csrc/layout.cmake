# GPTCORE_LAYOUT: a digest of the headers whose structs cross from one module to another. Modules with another one do
# not understand each other, and say so instead of crashing (bindings/module.cpp, attach_kernels).
file(GLOB GPTCORE_SHARED_HEADERS CONFIGURE_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/core/*.h
     ${CMAKE_CURRENT_LIST_DIR}/kernels/*/*_body.h ${CMAKE_CURRENT_LIST_DIR}/kernels/*/*_device.h)
set(GPTCORE_LAYOUT "")
foreach(header ${GPTCORE_SHARED_HEADERS})
  file(SHA256 ${header} digest)
  string(APPEND GPTCORE_LAYOUT ${digest})
endforeach()
string(SHA256 GPTCORE_LAYOUT "${GPTCORE_LAYOUT}")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${GPTCORE_SHARED_HEADERS})
